"""This package's own models in the background: a plain chat checkpoint, and a fork of the session.

The models are untrained: a scripted sampler says what they are to say.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="needs the background extra: pip install '.[test]'")
import torch

from background_kit import QUIET, WAIT_S, background_threads, call_ids, feed, plain, silent
from session_kit import END_OUT, SILENCE, assert_nothing_left, nano, scripted
from tml_core import Chunk, Session, Unsupported
from tml_core.background import (
    BackgroundRunner,
    Cancelled,
    Failed,
    Final,
    ForkBackend,
    LocalBackend,
    Partial,
    ToolOutput,
)
from tml_core.layout.chunk import compact_json

TEXT, CALL, END, STOP, MODEL = 261, 267, 270, 271, 258


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    assert background_threads() == []
    assert_nothing_left()
    assert plain().store.audit().num_sequences == 0


@contextmanager
def says(tokens: list[int]) -> Iterator[None]:
    """Give ``tokens`` in the place of the plain model's sampler, once its engine is warm."""
    left = iter(tokens)

    def sample(h_BD: torch.Tensor, _rows: Any, **_out: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([next(left)]), torch.zeros(len(h_BD))

    with Session(plain()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain().backbone, "sample", sample)
        yield


def spoken(text: str) -> list[int]:
    return [TEXT, *text.encode(), END, STOP]


def called(name: str, **args: Any) -> list[int]:
    body = compact_json("call", {"name": name, "args": args}).encode()
    return [*name.encode(), CALL, *body, END, STOP]


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def test_a_chat_checkpoint_answers() -> None:
    with says(spoken("hi")), BackgroundRunner(LocalBackend(plain())) as runner:
        updates = list(runner.submit("hello"))
        assert updates == [Partial("h"), Partial("i"), Final("hi")]


def test_a_chat_checkpoint_calls_tools() -> None:
    said = [*called("add", a=1, b=2), *called("add", a="x", b=2), *spoken("3")]
    with says(said), BackgroundRunner(LocalBackend(plain()), [add]) as runner:
        updates = list(runner.submit("1 + 2"))
        outputs = [one for one in updates if isinstance(one, ToolOutput)]
        assert outputs[0] == ToolOutput("call-0", "add", "3", num_bytes=1)
        assert outputs[1].is_error and "valid integer" in outputs[1].content
        assert updates[-1] == Final("3")


def test_a_malformed_call_is_answered_and_rounds_are_bounded() -> None:
    broken = [*b"add", CALL, *b"{", END, STOP]
    backend = LocalBackend(plain(), max_rounds=2)
    with says(broken * 2), BackgroundRunner(backend, [add]) as runner:
        assert runner.submit("1 + 2").result(WAIT_S) == Failed(
            "TmlError: no answer within 2 rounds (max_rounds)"
        )


def test_untrained_it_still_ends_within_its_tokens() -> None:
    with BackgroundRunner(LocalBackend(plain(), max_tokens=8, max_rounds=1)) as runner:
        job = runner.submit("hello")
        assert isinstance(job.result(WAIT_S), Final | Failed)


def test_cancel_closes_the_checkpoints_session() -> None:
    with BackgroundRunner(LocalBackend(plain(), max_tokens=100_000)) as runner:
        job = runner.submit("hello")
        for update in job:
            if isinstance(update, Partial):
                break
        job.cancel()
        assert job.result(WAIT_S) in (Cancelled("by its owner"), Final(""))


def test_a_cancel_while_the_session_opens_leaks_none() -> None:
    with BackgroundRunner(LocalBackend(plain(), max_tokens=4), max_jobs=8) as runner:
        for _ in range(8):
            runner.submit("hello").cancel()
        runner.drain(WAIT_S)


def test_a_model_that_knows_ticks_is_refused() -> None:
    with pytest.raises(Unsupported, match="model: expected a plain chat checkpoint"):
        LocalBackend(nano())


# Forks.


def test_a_fork_of_the_live_session_answers_and_shares_its_memory() -> None:
    with Session(nano()) as session, BackgroundRunner(ForkBackend(quiet_ticks=2)) as runner:
        session.attach(runner)
        with scripted(silent(3)):
            feed(session, num_ticks=3)
        before = session.token_ids().tolist()
        with scripted([*map(ord, "yes"), END_OUT, SILENCE, SILENCE]):
            job = runner.submit("is it noon", session=session)
            assert list(job) == [Partial("yes"), Final("yes")]
        runner.drain(WAIT_S)
        assert session.token_ids().tolist() == before


def test_a_fork_calls_tools() -> None:
    with (
        Session(nano()) as session,
        BackgroundRunner(ForkBackend(quiet_ticks=1, max_ticks=40), [add]) as runner,
    ):
        session.attach(runner)
        call = call_ids("add", a=1, b=2)
        with scripted([*call, ord("3"), END_OUT, *silent(40)]):
            job = runner.submit("1 + 2", session=session)
            updates = list(job)
        assert ToolOutput("call-0", "add", "3", num_bytes=1) in updates
        assert updates[-1] == Final("3")


def test_a_fork_waits_for_the_moment_between_two_ticks() -> None:
    with Session(nano()) as session, BackgroundRunner(ForkBackend(max_ticks=1)) as runner:
        session.attach(runner)
        with scripted([SILENCE, ord("a"), END_OUT], held=True) as script:
            turn = session.append(QUIET)
            script.reach()
            job = runner.submit("x", session=session)
            assert not job.is_done
            script.step()
            turn.result(WAIT_S)
            for _ in range(2):
                script.reach()
                script.step()
            assert job.result(WAIT_S) == Final("a")


def test_a_session_that_stays_busy_fails_the_job() -> None:
    with (
        Session(nano()) as session,
        BackgroundRunner(ForkBackend(fork_timeout_s=0.05)) as runner,
    ):
        session.attach(runner)
        with scripted([SILENCE], held=True) as script:
            turn = session.append(QUIET)
            script.reach()
            outcome = runner.submit("x", session=session).result(WAIT_S)
            assert isinstance(outcome, Failed) and "TimeoutError" in outcome.reason
            script.step()
            turn.result(WAIT_S)


def test_the_live_session_goes_on_while_its_fork_thinks() -> None:
    with (
        Session(nano()) as session,
        BackgroundRunner(ForkBackend(max_ticks=10)) as runner,
    ):
        session.attach(runner)
        job = runner.submit("x", session=session)
        while not job.is_done:
            feed(session, Chunk(text="a"))
        assert isinstance(job.result(), Final)


def test_a_fork_of_a_chat_session_answers() -> None:
    with (
        Session(plain()) as session,
        BackgroundRunner(ForkBackend()) as runner,
        says(spoken("hi")),
    ):
        session.attach(runner)
        session.append(Chunk(text="hello")).result(WAIT_S)
        job = runner.submit("answer", session=session)
        assert job.result(WAIT_S) == Final("hi")


@pytest.mark.parametrize("moment", ["fork", "tick"])
def test_cancel_closes_the_fork(moment: str) -> None:
    with (
        Session(nano()) as session,
        BackgroundRunner(ForkBackend(max_ticks=10_000)) as runner,
    ):
        session.attach(runner)
        job = runner.submit("x", session=session)
        if moment == "tick":
            assert next(iter(job)) is not None
        job.cancel()
        assert job.result(WAIT_S) == Cancelled("by its owner")
        runner.drain(WAIT_S)


def test_closing_the_live_session_ends_the_fork() -> None:
    session = Session(nano())
    with BackgroundRunner(ForkBackend(max_ticks=10_000)) as runner:
        session.attach(runner)
        job = runner.submit("x", session=session)
        closer = threading.Thread(target=session.close)
        closer.start()
        closer.join(WAIT_S)
        assert job.result(WAIT_S) == Cancelled("its session was closed")


def test_a_fork_needs_a_session() -> None:
    with BackgroundRunner(ForkBackend()) as runner:
        outcome = runner.submit("x").result(WAIT_S)
        assert isinstance(outcome, Failed)
        assert "a ForkBackend needs the session a job comes from" in outcome.reason
    with pytest.raises(ValueError, match="max_ticks: expected at least 1, got 0"):
        ForkBackend(max_ticks=0)
