"""A runner tied to a live session: calls become jobs, results enter it, closing ends them."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="needs the background extra: pip install '.[test]'")

from background_kit import (
    QUIET,
    WAIT_S,
    Answers,
    Gate,
    Steps,
    Updates,
    background_threads,
    call_ids,
    feed,
    silent,
    speech,
    words_in,
)
from session_kit import (
    END_OUT,
    SILENCE,
    Script,
    assert_nothing_left,
    nano,
    scripted,
    step_by_step,
)
from tml_core import Chunk, Engine, InvalidArgument, Overloaded, Session, SessionClosed
from tml_core.background import (
    BackgroundRunner,
    CallItem,
    Cancelled,
    ContextPackage,
    DeliveryPolicy,
    Failed,
    Final,
    Job,
    JobContext,
    Partial,
    ResultItem,
    SoundItem,
    TextItem,
)

POLICY = DeliveryPolicy(budget_tokens=160)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    assert_nothing_left()
    assert background_threads() == []


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(nano()) as session:
        yield session


def spell(session: Session, *calls: list[int]) -> None:
    """Feed ticks in which the model makes ``calls``, and nothing else."""
    for ids in calls:
        with _sampler(ids) as script:
            while not script.is_used_up:
                feed(session)


class _Used(Script):
    """A script that closes ticks with silence once it is used up, and knows when that is."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tokens)
        self._left = len(tokens)
        self.is_used_up = not tokens

    def __call__(self, h_BD: Any, rows: Any, **out: Any) -> Any:
        if self._left == 0:
            self._tokens = iter([SILENCE] * len(h_BD))
        else:
            self._left -= len(h_BD)
            self.is_used_up = self._left == 0
        return super().__call__(h_BD, rows, **out)


class _sampler:
    def __init__(self, tokens: list[int]) -> None:
        self._script = _Used(tokens)
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> _Used:
        step_by_step(self._patch)
        self._patch.setattr(nano().backbone, "sample", self._script)
        return self._script

    def __exit__(self, *_error: object) -> None:
        self._patch.undo()


def quietly(session: Session, num_ticks: int, chunk: Chunk = QUIET) -> None:
    """Ticks in which the model says nothing."""
    with scripted(silent(num_ticks)):
        feed(session, chunk, num_ticks)


def until_idle(runner: BackgroundRunner) -> None:
    """Let the runner do what the engine has told it so far, and end its jobs."""
    reached = threading.Event()
    runner._loop.post(reached.set)
    assert reached.wait(WAIT_S)
    runner.drain(WAIT_S)


def test_a_delegated_call_becomes_a_job_and_its_result_an_item(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        spell(session, call_ids("background", request="tea"))
        until_idle(runner)
        (job,) = runner.jobs
        assert (job.request, job.call_id, job.delivery) == ("tea", "call-0", "waiting")
        assert job.result() == Final("about tea")
        quietly(session, 6)
        assert job.delivery == "delivered"
        assert '{"call_id":"call-0","content":"about tea","name":"background"}' in words_in(session)


def test_a_job_of_the_application_enters_by_its_own_id(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        until_idle(runner)
        quietly(session, 3)
        assert job.delivery == "delivered"
        assert '{"call_id":"job-1","content":"about tea","name":"background"}' in words_in(session)


def test_a_failed_job_says_so_in_the_conversation(session: Session) -> None:
    async def run(_job: JobContext) -> Updates:
        raise OSError("no network")
        yield Final("")

    with BackgroundRunner(Steps(run), policy=POLICY) as runner:
        session.attach(runner)
        spell(session, call_ids("background", request="tea"))
        until_idle(runner)
        quietly(session, 6)
        assert '"error":"OSError: no network"' in words_in(session)


def test_a_result_waits_for_the_user_to_pause(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        quietly(session, 2, speech())
        job = runner.submit("tea", session=session)
        until_idle(runner)
        quietly(session, 4, speech())
        assert job.delivery == "waiting"
        quietly(session, 3)
        assert job.delivery == "waiting"
        quietly(session, 1)
        assert job.delivery == "delivered"


def test_a_result_waits_for_the_model_to_pause(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        until_idle(runner)
        with scripted([ord("a"), END_OUT]):
            job.delivery = "waiting"
            feed(session, speech())
        quietly(session, 3)
        assert job.delivery == "waiting"
        quietly(session, 1)
        assert job.delivery == "delivered"


def test_interrupt_and_silent_do_not_wait(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        quietly(session, 1, speech())
        urgent = runner.submit("tea", session=session, deliver="interrupt")
        until_idle(runner)
        aside = runner.submit("rain", session=session, deliver="silent")
        until_idle(runner)
        quietly(session, 6, speech())
        assert (urgent.delivery, aside.delivery) == ("delivered", "delivered")
        assert '"content":{"overtaken":true,"silent":true,"text":"about rain"}' in words_in(session)


@pytest.mark.parametrize("budget_tokens", [140, 160, 400])
def test_no_tick_takes_more_than_the_budget(session: Session, budget_tokens: int) -> None:
    text = " ".join(f"word{index}" for index in range(60))
    policy = DeliveryPolicy(budget_tokens=budget_tokens)
    with BackgroundRunner(Answers(lambda _request: text), policy=policy) as runner:
        session.attach(runner)
        job = runner.submit("x", session=session)
        until_idle(runner)
        layout_budget = nano().config.interaction.max_injected_per_tick  # type: ignore[union-attr]
        num_ticks = 0
        while job.delivery != "delivered" or session.info().num_waiting:
            with scripted([SILENCE]):
                stats = session.append(QUIET).result(WAIT_S).stats
            assert stats.num_input_tokens - 3 <= min(budget_tokens, layout_budget)
            num_ticks += 1
            assert num_ticks < 100
        said = "".join(
            one["text"] if isinstance(one, dict) else one
            for one in (item.content for _, item in _attachment(runner)._results)
        )
        assert said == text


def _attachment(runner: BackgroundRunner) -> Any:
    (attachment,) = runner._attachments
    return attachment


def test_a_budget_too_small_for_the_tokenizer_is_refused(session: Session) -> None:
    with (
        BackgroundRunner(Answers(), policy=DeliveryPolicy(budget_tokens=50)) as runner,
        pytest.raises(InvalidArgument, match=r"budget_tokens: expected at least \d+ for this"),
    ):
        session.attach(runner)


def test_typed_text_does_not_wait_behind_a_long_result(session: Session) -> None:
    text = "word " * 200
    with BackgroundRunner(Answers(lambda _request: text), policy=POLICY) as runner:
        session.attach(runner)
        job = runner.submit("x", session=session)
        until_idle(runner)
        quietly(session, 3)
        assert job.delivery == "entering"
        quietly(session, 1, Chunk(text="stop"))
        quietly(session, 3)
        # At most the piece that was on its way was ahead of it, and then the user has the floor.
        assert words_in(session).endswith("stop")
        assert job.delivery == "entering"


def test_a_later_word_of_the_user_overtakes_a_result(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        quietly(session, 1)
        job = runner.submit("tea", session=session)
        until_idle(runner)
        quietly(session, 1, Chunk(text="never mind"))
        quietly(session, 6)
        assert job.delivery == "delivered"
        assert '{"overtaken":true,"text":"about tea"}' in words_in(session)


@pytest.mark.parametrize("outcome", ["new words", "dropped", "raised"])
def test_what_was_overtaken_can_be_looked_at_again(session: Session, outcome: str) -> None:
    asked: list[tuple[str, list[str]]] = []

    async def recheck(job: Job, package: ContextPackage) -> str | None:
        typed = [one.text for one in package.items if isinstance(one, TextItem)]
        asked.append((job.id, typed))
        if outcome == "raised":
            raise ValueError("cannot tell")
        return None if outcome == "dropped" else "about coffee"

    with BackgroundRunner(Answers(), policy=POLICY, recheck=recheck) as runner:
        session.attach(runner)
        quietly(session, 1)
        job = runner.submit("tea", session=session)
        until_idle(runner)
        quietly(session, 1, Chunk(text="coffee"))
        quietly(session, 4)
        until_idle(runner)
        quietly(session, 6)
        assert asked == [("job-1", ["coffee"])]
        said = words_in(session)
        if outcome == "dropped":
            assert job.delivery == "dropped"
            assert "about" not in said
            return
        assert job.delivery == "delivered"
        expected = '"about coffee"' if outcome == "new words" else '"overtaken":true'
        assert f'"content":{expected}' in said or expected in said


def test_a_result_expires(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        quietly(session, 1, speech())
        job = runner.submit("tea", session=session, ttl_s=1.0)
        until_idle(runner)
        quietly(session, 5, speech())
        assert job.delivery == "waiting"
        quietly(session, 1, speech())
        assert job.delivery == "expired"


def test_a_duplicate_steers_is_rejected_or_runs(session: Session) -> None:
    for on_duplicate in ("steer", "reject", "allow"):
        gate = Gate()
        with (
            Session(nano()) as session,
            BackgroundRunner(gate, policy=POLICY, on_duplicate=on_duplicate) as runner,
        ):
            session.attach(runner)
            first = runner.submit("tea", session=session)
            gate.reach()
            if on_duplicate == "reject":
                with pytest.raises(Overloaded, match="submit: job-1 of this session still runs"):
                    runner.submit("green", session=session)
                spell(session, call_ids("background", request="green"))
                quietly(session, 6)
                assert "still runs" in words_in(session)
                continue
            second = runner.submit("green", session=session)
            assert (second is first) == (on_duplicate == "steer")
            gate.open()
            runner.drain(WAIT_S)
            assert gate.told == (["green"] if on_duplicate == "steer" else [])


def test_a_steering_call_is_answered(session: Session) -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY) as runner:
        session.attach(runner)
        spell(session, call_ids("background", request="tea"))
        gate.reach()
        spell(session, call_ids("background", request="green"))
        spell(session, call_ids("background_steer", text="hot", call_id="call-0"))
        quietly(session, 8)
        said = words_in(session)
        assert '{"call_id":"call-1","content":"passed on to call-0"' in said
        assert '{"call_id":"call-2","content":"done","name":"background_steer"}' in said
        gate.open()
        until_idle(runner)
        assert gate.told == ["green", "hot"]


def test_the_model_can_cancel_its_job(session: Session) -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY) as runner:
        session.attach(runner)
        spell(session, call_ids("background", request="tea"))
        gate.reach()
        spell(session, call_ids("background_cancel"))
        until_idle(runner)
        job = next(one for one in runner.jobs if one.request == "tea")
        assert job.result() == Cancelled("by the interaction model")
        spell(session, call_ids("background_cancel"))
        until_idle(runner)
        quietly(session, 12)
        said = words_in(session)
        assert '"content":"done","name":"background_cancel"' in said
        assert '"error":"no such task is running","name":"background_cancel"' in said
        assert job.delivery == "none"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("background", {}, "request: expected str, got NoneType"),
        ("background", {"request": " "}, "request: expected what is to be done"),
        ("background", {"request": "x", "deliver": "now"}, "deliver: expected one of"),
        ("background_steer", {"text": 3}, "no such task is running"),
        ("add", {"a": 1, "b": "x"}, "unable to parse string"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong(
    session: Session, name: str, args: dict[str, Any], message: str
) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    with BackgroundRunner(Answers(), [add], policy=POLICY) as runner:
        session.attach(runner)
        spell(session, call_ids(name, **args))
        until_idle(runner)
        quietly(session, 12)
        said = words_in(session)
        assert '"error":' in said and message in said


def test_a_malformed_call_is_answered(session: Session) -> None:
    broken = call_ids("x")
    del broken[-2]
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        spell(session, broken)
        until_idle(runner)
        quietly(session, 6)
        assert "not JSON" in words_in(session)


def test_the_model_may_call_tools_itself_and_others_stay_the_applications(
    session: Session,
) -> None:
    async def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    with BackgroundRunner(Answers(), [add], policy=POLICY) as runner:
        assert [one["name"] for one in runner.declarations] == [
            "background",
            "background_steer",
            "background_cancel",
            "add",
        ]
        session.attach(runner)
        spell(session, call_ids("add", a=1, b=2), call_ids("theirs"))
        until_idle(runner)
        quietly(session, 4, speech())
        assert '{"call_id":"call-0","content":"3","name":"add"}' in words_in(session)
        assert len(runner.jobs) == 1
        session.add_tool_result("call-1", "mine")
        quietly(session, 2)
        assert '{"call_id":"call-1","content":"mine","name":"theirs"}' in words_in(session)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_rewind_undoes_the_call_and_its_job(session: Session, is_running: bool) -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY) as runner:
        session.attach(runner)
        mark = session.mark()
        spell(session, call_ids("background", request="tea"))
        gate.reach()
        (job,) = runner.jobs
        if not is_running:
            gate.open()
            until_idle(runner)
            assert job.delivery == "waiting"
        session.rewind(mark)
        quietly(session, 1)
        if is_running:
            assert job.result(WAIT_S) == Cancelled("its call was undone")
        else:
            assert job.delivery == "dropped"
        # The same call once more is another job.
        spell(session, call_ids("background", request="coffee"))
        until_idle(runner) if not is_running else gate.reach()
        gate.open()
        until_idle(runner)
        quietly(session, 5)
        assert words_in(session).count("through the gate") == 1
        assert runner.jobs[-1].request == "coffee"


def test_a_rewind_lets_a_result_enter_again(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        until_idle(runner)
        mark = session.mark()
        quietly(session, 3)
        assert job.delivery == "delivered"
        once = words_in(session)
        session.rewind(mark)
        quietly(session, 3)
        assert words_in(session) == once
        assert once.count("about tea") == 1


def test_a_call_nobody_heard_is_undone_and_results_stay(session: Session) -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY, on_duplicate="allow") as runner:
        session.attach(runner)
        with scripted([ord("a"), END_OUT]):
            feed(session)
        ours = runner.submit("tea", session=session)
        gate.reach()
        gate.open()
        until_idle(runner)
        quietly(session, 6)
        assert ours.delivery == "delivered"
        held = Gate()
        runner._loop._backend = held
        spell(session, call_ids("background", request="coffee"))
        held.reach()
        theirs = runner.jobs[-1]
        session.truncate(0)
        quietly(session, 1)
        assert theirs.result(WAIT_S) == Cancelled("its call was undone")
        quietly(session, 3)
        assert words_in(session).count("through the gate") == 1
        assert ours.delivery == "delivered"


def test_an_append_that_is_undone_does_not_lose_or_double_a_result(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        runner.submit("tea", session=session)
        until_idle(runner)
        with scripted([SILENCE] * 9, held=True) as script:
            turn = session.append(QUIET)
            script.reach()
            canceller = threading.Thread(target=lambda: turn.cancel("none"))
            canceller.start()
            while turn.cancelled is None:
                pass
            script.step()
            canceller.join(WAIT_S)
            assert "about tea" not in words_in(session)
        quietly(session, 4)
        assert words_in(session).count("about tea") == 1


def test_a_refused_chunk_does_not_lose_a_result(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        runner.submit("tea", session=session)
        until_idle(runner)
        with pytest.raises(InvalidArgument, match="text: expected valid Unicode"):
            session.append(Chunk(text="\ud800"))
        quietly(session, 4)
        assert words_in(session).count("about tea") == 1


def test_the_package_holds_the_conversation(session: Session) -> None:
    picture = np.full((40, 40, 3), 7, np.uint8)
    packages: list[ContextPackage] = []

    async def run(job: JobContext) -> Updates:
        packages.append(job.package)
        yield Final("done")

    with BackgroundRunner(Steps(run), policy=POLICY) as runner:
        session.attach(runner)
        quietly(session, 1, Chunk(text="hello"))
        with scripted([*map(ord, "hi"), END_OUT, ord("!"), END_OUT]):
            feed(session, num_ticks=2)
        quietly(session, 2, Chunk(audio=speech().audio, frames=[picture]))
        quietly(session, 5, Chunk(frames=[picture]))
        spell(session, call_ids("background", request="one"))
        until_idle(runner)
        quietly(session, 5)
        call_tick = next(one.tick for one in session.transcript() if one.calls)
        runner.submit("two", session=session).result(WAIT_S)
        first, second = packages
        assert first.items[:3] == (
            TextItem("user", "hello", 0, 200),
            TextItem("model", "hi!", 200, 600),
            SoundItem(600, 1000, pytest.approx(0.288, abs=0.01)),  # type: ignore[arg-type]
        )
        raw = '{"args":{"request":"one"},"name":"background"}'
        assert first.items[3:] == (CallItem("background", "call-0", raw, call_tick * 200),)
        assert [one.start_ms for one in first.frames] == [600, 1600]
        assert (first.frames[0].rgb == 7).all()
        assert isinstance(second.items[-1], ResultItem)
        assert second.items[-1].content == "done"
        assert second.session is session
        assert "[0.0 s] user typed: hello\n[0.2 s] assistant said: hi!" in second.conversation()
        assert second.conversation(30).startswith("(")


def test_closing_the_session_ends_its_jobs_and_no_others(session: Session) -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY, on_duplicate="allow") as runner:
        session.attach(runner)
        with Session(nano()) as other:
            other.attach(runner)
            mine, theirs = runner.submit("a", session=session), runner.submit("b", session=other)
            gate.reach()
            gate.reach()
        assert theirs.result(WAIT_S) == Cancelled("its session was closed")
        assert not mine.is_done
        with pytest.raises(SessionClosed, match="submit: the session is closed"):
            runner.submit("c", session=other)
        gate.open()
        assert mine.result(WAIT_S) == Final("through the gate")


def test_closing_the_engine_ends_the_jobs_of_its_sessions() -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY) as runner:
        with Engine(nano()) as engine:
            session = engine.open()
            session.attach(runner)
            job = runner.submit("a", session=session)
            gate.reach()
        assert job.result(WAIT_S) == Cancelled("its session was closed")


def test_a_session_nobody_holds_ends_its_jobs() -> None:
    gate = Gate()
    with BackgroundRunner(gate, policy=POLICY) as runner:
        session = Session(nano())
        session.attach(runner)
        job = runner.submit("a", session=session)
        gate.reach()
        del session
        gc.collect()
        assert job.result(WAIT_S) == Cancelled("its session was closed")


def test_a_closed_runner_leaves_the_session_alone(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
    spell(session, call_ids("background", request="tea"))
    quietly(session, 3)
    with (
        Session(nano()) as other,
        pytest.raises(SessionClosed, match="runner: it is closed"),
    ):
        other.attach(runner)


def test_a_session_takes_one_runner(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        with pytest.raises(InvalidArgument, match="attach: expected a session without a runner"):
            session.attach(runner)
        other = Session(nano())
        other.close()
        with pytest.raises(SessionClosed, match="attach: the session is closed"):
            other.attach(runner)


def test_a_fork_is_not_attached(session: Session) -> None:
    with BackgroundRunner(Answers(), policy=POLICY) as runner:
        session.attach(runner)
        with session.fork() as twin:
            spell(twin, call_ids("background", request="tea"))
            until_idle(runner)
            assert runner.jobs == ()


def test_a_job_that_fails_at_once_fails_in_its_words(session: Session) -> None:
    async def run(job: JobContext) -> Updates:
        session.close()
        yield Final(job.package.request)

    with BackgroundRunner(Steps(run), policy=POLICY) as runner:
        session.attach(runner)
        job = runner.submit("a", session=session)
        assert job.result(WAIT_S) in (Final("a"), Cancelled("its session was closed"))
        assert not isinstance(job.result(), Failed)


class _Writer:
    """A backend whose answer the test writes, piece by piece."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self.final = ""

    async def run(self, _job: JobContext) -> Updates:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        while (piece := await self._pieces.get()) is not None:
            if piece == "raise":
                raise OSError("the line went dead")
            yield Partial(piece)
        yield Final(self.final)

    def write(self, piece: str | None) -> None:
        assert self._begun.wait(WAIT_S)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


def caught_up(runner: BackgroundRunner, job: Job, num_updates: int) -> None:
    """Wait until a job has said so much, and the runner has passed it on."""
    for _, _update in zip(range(num_updates), job, strict=False):
        pass
    reached = threading.Event()
    runner._loop.post(reached.set)
    assert reached.wait(WAIT_S)


def test_an_answer_enters_while_it_is_written(session: Session) -> None:
    writer = _Writer()
    with BackgroundRunner(writer, policy=POLICY, streams=True) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        writer.write("Green tea wants")
        caught_up(runner, job, 1)
        quietly(session, 2)
        assert job.delivery == "waiting" and "Green" not in words_in(session)
        writer.write(" eighty degrees. Black")
        caught_up(runner, job, 2)
        quietly(session, 3)
        assert job.delivery == "entering"
        assert '"content":{"more":true,"text":"Green tea wants eighty degrees. "}' in words_in(
            session
        )
        writer.final = "Green tea wants eighty degrees. Black tea more."
        writer.write(None)
        job.result(WAIT_S)
        until_idle(runner)
        quietly(session, 3)
        assert job.delivery == "delivered"
        assert words_in(session).endswith(
            '{"call_id":"job-1","content":"Black tea more.","name":"background"}'
        )


def test_a_streamed_answer_that_ends_otherwise_is_said_whole(session: Session) -> None:
    writer = _Writer()
    with BackgroundRunner(writer, policy=POLICY, streams=True) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        writer.write("I will look that up for you. ")
        writer.final = "Eighty degrees."
        writer.write(None)
        job.result(WAIT_S)
        until_idle(runner)
        quietly(session, 8)
        said = words_in(session)
        assert '{"more":true,"text":"I will look that up for you. "}' in said
        assert said.endswith('"content":"Eighty degrees.","name":"background"}')


@pytest.mark.parametrize("streams", [False, True])
def test_a_result_that_is_too_long_is_cut(session: Session, streams: bool) -> None:
    writer = _Writer()
    policy = DeliveryPolicy(budget_tokens=400, max_chars=60)
    with BackgroundRunner(writer, policy=policy, streams=streams) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        pieces = ["Green tea wants eighty degrees. ", "q" * 1_000_000]
        for piece in pieces:
            writer.write(piece)
        writer.final = "".join(pieces)
        writer.write(None)
        job.result(WAIT_S)
        until_idle(runner)
        quietly(session, 20)
        assert job.delivery == "delivered"
        said = words_in(session)
        assert said.count("Green tea wants eighty degrees. ") == 1
        assert said.count("q") == 28
        assert "[cut: 60 of 1000032 characters]" in said


@pytest.mark.parametrize("how", ["raise", "cancel"])
def test_a_streamed_answer_that_breaks_off(session: Session, how: str) -> None:
    writer = _Writer()
    with BackgroundRunner(writer, policy=POLICY, streams=True) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        writer.write("Green tea wants eighty degrees. ")
        caught_up(runner, job, 1)
        quietly(session, 3)
        assert job.delivery == "entering"
        if how == "raise":
            writer.write("raise")
        else:
            job.cancel()
        job.result(WAIT_S)
        until_idle(runner)
        quietly(session, 4)
        said = words_in(session)
        if how == "raise":
            assert job.delivery == "delivered"
            assert '"error":"OSError: the line went dead"' in said
        else:
            assert job.delivery == "dropped"
            assert said.endswith('degrees. "},"name":"background"}')


def test_text_that_is_no_unicode_enters_as_far_as_it_is(session: Session) -> None:
    with BackgroundRunner(Answers(lambda _request: "a \ud800 b"), policy=POLICY) as runner:
        session.attach(runner)
        job = runner.submit("tea", session=session)
        until_idle(runner)
        quietly(session, 3)
        assert job.delivery == "delivered"
        assert '"content":"a ? b"' in words_in(session)


def test_tool_calls_of_the_model_take_no_place_of_jobs(session: Session) -> None:
    release = threading.Event()

    async def wait() -> str:
        while not release.is_set():
            await asyncio.sleep(0.001)
        return "waited"

    with BackgroundRunner(Answers(), [wait], policy=POLICY, max_jobs=1) as runner:
        session.attach(runner)
        spell(session, call_ids("wait"))
        assert runner.submit("tea").result(WAIT_S) == Final("about tea")
        release.set()


def test_a_tool_with_a_long_name_needs_a_larger_budget(session: Session) -> None:
    def a_tool_with_quite_a_long_name_that_takes_many_tokens_to_spell_out() -> int:
        return 1

    tool = a_tool_with_quite_a_long_name_that_takes_many_tokens_to_spell_out
    with (
        BackgroundRunner(Answers(), [tool], policy=DeliveryPolicy(budget_tokens=140)) as runner,
        pytest.raises(InvalidArgument, match=r"budget_tokens: expected at least \d+ for this"),
    ):
        session.attach(runner)
