"""A plain checkpoint: input streams into the chat template, `commit` asks for the answer."""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from byte_model import BYTE_MODEL
from session_kit import WAIT_S, engine_threads, nano, noise, standing
from tml_core import Chunk, Model, Session, TextToken, ToolCall, errors, load_model

TEXT, THINKING, CALL, END, STOP, MODEL = 261, 265, 267, 270, 271, 258


@functools.cache
def plain() -> Model:
    """Nano without its interaction block: a plain Inkling checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((BYTE_MODEL / "config.json").read_text())
        del config["interaction"]
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copy(BYTE_MODEL / "tokenizer.json", folder)
        return load_model(folder, max_sequences=3)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    yield
    assert engine_threads() == []
    assert plain().store.audit().num_sequences == 0


def scripted(patch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Give ``tokens`` in the place of the sampler's."""
    left = iter(tokens)
    patch.setattr(
        plain().backbone,
        "sample",
        lambda h, _, **_out: (torch.tensor([next(left)]), torch.zeros(len(h))),
    )


def test_input_streams_and_commit_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [THINKING, 104, END, MODEL, TEXT, 105, END, STOP]
    with Session(plain(), system="s", effort="low") as session:
        scripted(monkeypatch, answer)
        prefix = session.token_ids().tolist()
        effort = list(b"Thinking effort level: 0.2")
        assert prefix == [259, 261, 115, END, 259, 261, *effort, END]
        for part in (noise(0), Chunk(text="a"), Chunk(text="b")):
            result = session.append(part).result(WAIT_S)
            assert [one.reason for one in result.events] == ["input"]  # type: ignore[attr-defined]
        assert session.info().media_ms == 600
        turn = session.commit()
        events = list(turn)
        said = [(one.text, one.channel) for one in events if isinstance(one, TextToken)]
        assert said == [("h", "thinking"), ("i", "text")]
        assert turn.result().text == "i"
        assert session.token_ids().tolist()[len(prefix) :] == [
            257, 263, *[-1] * 4, 264, END,
            257, 261, *b"ab", END,
            MODEL, *answer,
        ]  # fmt: skip
        with pytest.raises(errors.InvalidArgument, match="commit: expected input since the last"):
            session.commit()
        records = session.transcript()
        assert [one.tick for one in records] == [0, 1, 2, 3]
        assert records[-1].text_out == "i"


def test_a_sampled_answer_ends_within_its_budget() -> None:
    with Session(plain(), seed=3) as session:
        session.append(Chunk(text="hello")).result(WAIT_S)
        ids = session.commit(max_tokens=5).result(WAIT_S).done.token_ids
        assert ids[-1] == STOP
        assert len(ids) <= 7
    with Session(plain(), seed=3) as session:
        for piece in ("he", "llo"):
            session.append(Chunk(text=piece)).result(WAIT_S)
        assert session.commit(max_tokens=5).result(WAIT_S).done.token_ids == ids


def test_tool_calls_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    call = [*b"f", CALL, *b'{"name":"f","args":{"x":1}}', END, STOP]

    def f(x: int) -> int:
        """Double."""
        return 2 * x

    with Session(plain(), tools=[f]) as session:
        scripted(monkeypatch, [*call, TEXT, END, STOP])
        session.append(Chunk(text="2?")).result(WAIT_S)
        for event in session.commit():
            if isinstance(event, ToolCall):
                session.add_tool_result(event.call_id, f(**event.args))
        before = session.info().position
        session.append(Chunk(is_idle=True)).result(WAIT_S)
        session.commit().result(WAIT_S)
        assert session.token_ids()[before:].tolist() == [
            260, *b"f", TEXT, *b"2", END, MODEL, TEXT, END, STOP,
        ]  # fmt: skip


def test_cancelled_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(plain(), seed=1) as session:
        session.append(Chunk(text="x")).result(WAIT_S)
        before = standing(session)
        turn = session.commit(max_tokens=10_000)
        turn.cancel("none")
        if turn.result().done.reason == "cancelled":
            assert standing(session) == before
        scripted(monkeypatch, [TEXT] + [65] * 10_000)
        turn = session.commit(max_tokens=10_000)
        next(iter(turn))
        turn.cancel("input")
        assert turn.result().done.token_ids == (TEXT, END, STOP)
        assert session.token_ids().tolist()[-4:] == [MODEL, TEXT, END, STOP]


def test_a_cancelled_append_of_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(plain()) as session:
        scripted(monkeypatch, [])
        before = standing(session)
        for keep in ("none", "input"):
            turn = session.append(noise(0))
            turn.cancel(keep)  # type: ignore[arg-type]
            reason = turn.result().done.reason
            assert reason in ("cancelled", "input")
            if keep == "none" and reason == "cancelled":
                assert standing(session) == before
        assert session.info().tick >= 1


def test_the_snapshot_of_a_chat(tmp_path: Path) -> None:
    pcm = np.random.default_rng(0).uniform(-0.1, 0.1, 1500).astype(np.float32)
    with Session(plain(), seed=5) as session:
        session.append(Chunk(audio=pcm)).result(WAIT_S)
        session.snapshot(tmp_path / "chat.tml")
        session.append(Chunk(audio=pcm)).result(WAIT_S)
        expected = session.commit(max_tokens=6).result(WAIT_S).events
    with Session.restore(tmp_path / "chat.tml", plain()) as session:
        session.append(Chunk(audio=pcm)).result(WAIT_S)
        assert session.commit(max_tokens=6).result(WAIT_S).events == expected
    with pytest.raises(errors.SnapshotError, match="layout: expected 'micro-turn v1'"):
        Session.restore(tmp_path / "chat.tml", nano())


def test_commit_refusals() -> None:
    with Session(nano()) as session, pytest.raises(errors.Unsupported, match="answers every tick"):
        session.commit()
    with Session(plain()) as session:
        with pytest.raises(errors.InvalidArgument, match="commit: expected input"):
            session.commit()
        with pytest.raises(errors.InvalidArgument, match="max_tokens: expected an int"):
            session.commit(max_tokens=0)
    with pytest.raises(errors.InvalidArgument, match=r"effort: expected 0 to 0\.99, got 3"):
        Session(plain(), effort=3.0)
