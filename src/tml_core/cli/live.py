"""``tml-core run``: feed a recording to a session, tick by tick, and show what happens."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import av
import soundfile
from rich.console import Console
from rich.live import Live

from tml_core import _ext
from tml_core.cli.picture import RunPicture
from tml_core.cli.reply import ReplyFile
from tml_core.cli.timeline import TickView, Totals, footer, header, job_line, plain_line, row
from tml_core.engine.model import Model, load_model
from tml_core.engine.sampler import SamplingParams
from tml_core.errors import InvalidArgument
from tml_core.layout.chunk import Chunk, as_chunk
from tml_core.layout.events import AudioChunk, Notice, Silence, TextToken, ToolCall
from tml_core.media.clips import clips
from tml_core.media.micro_turns import TICK_MS, MicroTurn, micro_turns
from tml_core.ops._common import num_threads
from tml_core.session import Session

if TYPE_CHECKING:
    from tml_core.background.runner import BackgroundRunner
    from tml_core.cli.jobs import JobLines

__all__ = ["RunOptions", "run_live"]


@dataclass(frozen=True)
class RunOptions:
    """What to feed to which model, and how. Without sound and video the bundled clip is fed.
    ``typed``: what the user types, each as "SECONDS:TEXT"."""

    model: str = "nano"
    audio: Path | None = None
    video: Path | None = None
    is_realtime: bool = False
    seed: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_ticks: int | None = None
    typed: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    system: str | None = None
    transcript: Path | None = None
    out: Path | None = None
    plot: Path | None = None
    background: str | None = None
    background_model: str | None = None
    delegate: str | None = None


def run_live(options: RunOptions, console: Console) -> Totals:
    """Run the feed to its end, or to a Ctrl-C, which is passed on after the totals are shown."""
    typed = _typed(options.typed)
    feed = _open_feed(options)
    with ExitStack() as stack:
        log = None
        if options.transcript is not None:
            log = stack.enter_context(_opened(options.transcript))
        model = load_model(options.model, dtype=options.dtype, max_sequences=1)
        reply = None
        if options.out is not None:
            reply = ReplyFile(options.out, model.config)
            stack.callback(reply.close)
        picture = None
        if options.plot is not None:
            title = f"{options.model}{'' if model.is_trained else ' (untrained)'}: {feed.words}"
            picture = RunPicture(options.plot, title)
        runner = None
        if options.background is not None:
            from tml_core.cli.jobs import background_runner  # its packages are an extra

            where, name = options.background, options.background_model
            runner = stack.enter_context(
                background_runner(where, name, heeds_model=model.is_trained)
            )
        session = stack.enter_context(
            Session(
                model,
                seed=options.seed,
                sampling=options.sampling,
                system=options.system,
                tools=() if runner is None else runner.declarations,
            )
        )
        view = _View(console, feed.media_ms, log, reply, picture)
        view.open(options, model, feed.words)
        try:
            if runner is not None:
                _attach(session, runner, options.delegate, view)
            _run(session, _with_text(feed.ticks, typed), options.is_realtime, view, runner)
        finally:
            view.close()
        return view.totals


@dataclass(frozen=True)
class _Feed:
    ticks: Iterator[MicroTurn]
    media_ms: int | None
    words: str


def _open_feed(options: RunOptions) -> _Feed:
    audio, video = options.audio, options.video
    if audio is None and video is None:
        audio, video = clips()
    duration_s = None if options.max_ticks is None else options.max_ticks * TICK_MS / 1000
    ticks = micro_turns(audio, video, duration_s=duration_s)
    lengths_ms = [_audio_ms(audio)] if audio is not None else []
    lengths_ms += [_video_ms(video)] if video is not None else []
    known_ms = [one for one in lengths_ms if one is not None]
    media_ms = -(-max(known_ms) // TICK_MS) * TICK_MS if known_ms else None
    if options.max_ticks is not None:
        media_ms = min(media_ms or options.max_ticks * TICK_MS, options.max_ticks * TICK_MS)
    names = [one.name for one in (audio, video) if one is not None]
    pace = "at the pace of the recording" if options.is_realtime else "as fast as it goes"
    return _Feed(ticks, media_ms, f"{' and '.join(names)}, {pace}")


def _typed(given: Sequence[str]) -> dict[int, str]:
    """What is typed in which tick."""
    by_tick: dict[int, str] = {}
    for one in given:
        at, colon, text = one.partition(":")
        try:
            at_ms = round(1000 * float(at)) if colon and text else -1
        except (ValueError, OverflowError):
            at_ms = -1
        if at_ms < 0:
            raise InvalidArgument(f"type: expected SECONDS:TEXT, got {one!r}")
        tick = at_ms // TICK_MS
        by_tick[tick] = f"{by_tick[tick]} {text}" if tick in by_tick else text
    return by_tick


def _with_text(ticks: Iterator[MicroTurn], typed: Mapping[int, str]) -> Iterator[Chunk]:
    """The feed with what is typed meanwhile. Raises InvalidArgument for what comes after its end:
    nothing is lost in silence."""
    index = -1
    for index, micro_turn in enumerate(ticks):
        chunk = as_chunk(micro_turn)
        yield replace(chunk, text=typed[index]) if index in typed else chunk
    if late := sorted(tick for tick in typed if tick > index):
        raise InvalidArgument(
            f"type: the recording ended after {(index + 1) * TICK_MS / 1000} s, before "
            f"{typed[late[0]]!r} was typed at {late[0] * TICK_MS / 1000} s"
        )


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"transcript: cannot write {path}: {error.strerror}") from error


def _audio_ms(path: Path) -> int | None:
    try:
        duration_s: float = soundfile.info(str(path)).duration
        return round(1000 * duration_s)
    except soundfile.LibsndfileError:
        return _video_ms(path)


def _video_ms(path: Path) -> int | None:
    with av.open(str(path)) as container:
        duration_us: int | None = container.duration
        return None if duration_us is None else duration_us // 1000


def _attach(
    session: Session, runner: "BackgroundRunner", delegate: str | None, view: "_View"
) -> None:
    """Tie them together. A model that is untrained delegates nothing, so we do in its place."""
    from tml_core.cli.jobs import DEFAULT_REQUEST, JobLines

    session.attach(runner)
    view.jobs = JobLines(runner)
    request = delegate
    if request is None and not session.model.is_trained:
        request = DEFAULT_REQUEST
    if request is not None:
        runner.submit(request, session=session)


def _run(
    session: Session,
    chunks: Iterator[Chunk],
    is_realtime: bool,
    view: "_View",
    runner: "BackgroundRunner | None" = None,
) -> None:
    start_s = time.perf_counter()
    is_ticking = session.model.config.interaction is not None
    index = -1
    for index, chunk in enumerate(chunks):
        if is_realtime:
            # 200 ms of sound are there when they have passed.
            due_s = start_s + (index + 1) * TICK_MS / 1000
            time.sleep(max(0.0, due_s - time.perf_counter()))
        result = session.append(chunk).result()
        view.show(TickView(index, chunk, result), session, time.perf_counter() - start_s)
    if runner is not None:
        from tml_core.cli.jobs import idle_chunks

        view.totals.media_ms = None  # how long results take to enter is not known
        for extra, chunk in enumerate(idle_chunks(runner), index + 1):
            result = session.append(chunk).result()
            view.show(TickView(extra, chunk, result), session, time.perf_counter() - start_s)
        view.show_jobs()
    if not is_ticking:
        view.answer(session)


class _View:
    """Rows above a footer that stays, or plain lines; and the files that were asked for."""

    def __init__(
        self,
        console: Console,
        media_ms: int | None,
        log: TextIO | None,
        reply: ReplyFile | None,
        picture: RunPicture | None,
    ) -> None:
        self.totals = Totals(media_ms)
        self._console = console
        self._log = log
        self._reply = reply
        self._picture = picture
        self._live: Live | None = None
        self.jobs: JobLines | None = None

    def open(self, options: RunOptions, model: Model, feed: str) -> None:
        dtype = str(model.dtype).removeprefix("torch.")
        machine = f"{dtype} on the CPU ({_ext.isa()}, {num_threads()} threads), seed {options.seed}"
        self._write(
            type="session",
            model=options.model,
            is_trained=model.is_trained,
            fingerprint=model.fingerprint,
            dtype=dtype,
            seed=options.seed,
            sampling=asdict(options.sampling),
        )
        if not self._console.is_terminal:
            note = "" if model.is_trained else " (untrained: what it writes is noise)"
            self._console.print(f"model {options.model}{note}, {machine}; {feed}", soft_wrap=True)
            return
        self._console.print(header(options.model, model.is_trained, machine, feed))
        self._live = Live(footer(self.totals), console=self._console, auto_refresh=False)
        self._live.start()

    def show(self, tick: TickView, session: Session, wall_s: float) -> None:
        info = session.info()
        self.totals.add(tick, info.position, info.kv_bytes, wall_s)
        self._write(type="tick", **_tick_record(tick))
        if self._reply is not None:
            self._reply.add(tick.index, tick.result.events)
        if self._picture is not None:
            self._picture.add(tick)
        if self._live is None:
            self._console.print(plain_line(tick), markup=False, highlight=False, soft_wrap=True)
        else:
            self._live.console.print(row(tick))
        self.show_jobs()
        if self._live is not None:
            self._live.update(footer(self.totals), refresh=True)

    def show_jobs(self) -> None:
        """What background jobs did since the last tick."""
        for line in () if self.jobs is None else self.jobs.new():
            self._write(type="job", text=line)
            if self._live is None:
                self._console.print(job_line(line), highlight=False, soft_wrap=True)
            else:
                self._live.console.print(job_line(line))

    def answer(self, session: Session) -> None:
        """A plain chat checkpoint has taken everything in; now it answers."""
        result = session.commit().result()
        self.totals.num_tokens += result.stats.num_output_tokens
        self._write(type="answer", text=result.text, ms=result.stats.total_ms)
        self._console.print(f"answer: {result.text}", markup=False, soft_wrap=True)

    def close(self) -> None:
        self._write(type="summary", **self.totals.to_dict())
        if self._picture is not None:
            self._picture.close()
        if self._live is not None:
            self._live.stop()
            return
        totals = self.totals
        self._console.print(
            f"{len(totals.tick_ms)} ticks in {totals.wall_s:.1f} s, median "
            f"{totals.percentile_ms(50):.1f} ms, slowest {totals.percentile_ms(100):.1f} of "
            f"{TICK_MS}, {totals.num_late} late, {totals.num_tokens} tokens, "
            f"{totals.position} positions, {totals.kv_bytes / 2**20:.1f} MiB",
            highlight=False,
            soft_wrap=True,
        )

    def _write(self, **record: Any) -> None:
        if self._log is not None:
            self._log.write(json.dumps(record) + "\n")


def _tick_record(tick: TickView) -> dict[str, Any]:
    stats, chunk, events = tick.result.stats, tick.chunk, tick.result.events
    times = ("queued_ms", "prefill_ms", "decode_ms", "first_token_ms", "total_ms", "slack_ms")
    return {
        "tick": tick.index,
        "t_ms": tick.index * TICK_MS,
        "in": {
            "num_samples": 0 if chunk.audio is None else len(chunk.audio),
            "num_frames": len(chunk.frames),
            "text": chunk.text,
        },
        "out": {
            "text": tick.result.text,
            "token_ids": list(tick.result.done.token_ids),
            "num_samples": sum(len(one.pcm) for one in events if isinstance(one, AudioChunk)),
            "logprobs": [one.logprob for one in events if isinstance(one, TextToken | Silence)],
            "calls": [
                {"name": one.name, "args": one.args, "call_id": one.call_id, "error": one.error}
                for one in events
                if isinstance(one, ToolCall)
            ],
            "notices": [one.message for one in events if isinstance(one, Notice)],
            "reason": tick.result.done.reason,
        },
        "stats": {name: getattr(stats, name) for name in times}
        | {
            "num_input_tokens": stats.num_input_tokens,
            "num_output_tokens": stats.num_output_tokens,
            "position": stats.position,
            "num_pages": stats.num_pages,
        },
    }
