"""When results enter, in what pieces and order, what is undone, expires or was overtaken."""

import random
from typing import Any

import pytest

from tml_core import InvalidArgument, TickRecord, ToolResult
from tml_core.background import ContextPackage, DeliveryPolicy, Job
from tml_core.background.delivery import (
    MAX_WAITING,
    OVERTAKEN,
    Entry,
    Floor,
    Outbox,
    floor,
    least_budget,
    split_result,
)
from tml_core.layout.chunk import compact_json

FREE, USER, MODEL = Floor(False, False), Floor(True, False), Floor(False, True)


def count(item: ToolResult) -> int:
    """A tokenizer of bytes, and what frames a result."""
    kind = "error" if item.is_error else "content"
    value = {"call_id": item.call_id, "name": item.name, kind: item.content}
    return 2 + len(compact_json("item", value).encode())


def record(
    tick: int, *, rms: float | None = None, typed: str = "", said: str = "", sound_ms: int = 0
) -> TickRecord:
    return TickRecord(
        tick=tick,
        t_ms=200 * tick,
        audio_ms=0 if rms is None else 200,
        audio_rms=rms,
        num_frames=0,
        text_in=typed,
        num_items=0,
        text_out=said,
        is_silent=not said,
        calls=(),
        reason="end",
        sound_ms=sound_ms,
    )


def job(name: str = "job-1", call_id: str | None = None, **options: Any) -> Job:
    settings: dict[str, Any] = {"deliver": "when_idle", "priority": 0, "ttl_s": 60.0}
    settings |= {"deadline_s": 1.0, "stop": lambda _job: None, "call_id": call_id}
    return Job(name, ContextPackage("x"), **settings | options)


def entry(one: Job, num_pieces: int = 1, **options: Any) -> Entry:
    pieces = [ToolResult(one.id, f"piece {index}", name="b") for index in range(num_pieces)]
    settings: dict[str, Any] = {"deliver": one.deliver, "priority": one.priority}
    settings |= {"ready_tick": 0, "expires_tick": 1000, "seen_tick": 0}
    return Entry(one, pieces, **settings | options)


def outbox(policy: DeliveryPolicy | None = None) -> Outbox:
    return Outbox(policy or DeliveryPolicy(), lambda _entry: False)


# The floor.


def test_the_floor_is_free_after_quiet_ms() -> None:
    policy = DeliveryPolicy(quiet_ms=600, speech_rms=0.01)

    def at(records: list[TickRecord], **now: Any) -> Floor:
        given = {"audio_rms": None, "has_text": False, "is_in_call": False} | now
        rms = given.pop("audio_rms")
        return floor(policy, reversed(records), rms, **given)

    assert at([]) == FREE
    assert at([], audio_rms=0.02) == USER
    assert at([], audio_rms=0.009) == FREE
    assert at([], has_text=True) == USER
    assert at([], is_in_call=True) == MODEL
    loud = [record(0, rms=0.5), *(record(tick, rms=0.001) for tick in range(1, 4))]
    assert at(loud[:3]) == USER
    assert at(loud) == FREE
    assert at([record(0, said="well"), record(1), record(2)]) == MODEL
    assert at([record(0, said="well"), record(1), record(2), record(3)]) == FREE
    assert at([record(0, sound_ms=200), record(1), record(2)]) == MODEL
    assert at([record(0, typed="hi"), record(1)]) == USER
    assert at([record(0, typed="hi", said="well")]) == Floor(True, True)


def test_a_policy_may_not_heed_the_model() -> None:
    policy = DeliveryPolicy(heeds_model=False)
    said = [record(0, said="noise")]
    assert floor(policy, said, None, has_text=False, is_in_call=True) == FREE


def test_no_quiet_asked_for_looks_at_this_tick_alone() -> None:
    policy = DeliveryPolicy(quiet_ms=0)
    assert floor(policy, [record(0, rms=0.5)], None, has_text=False, is_in_call=False) == FREE
    assert floor(policy, [], 0.5, has_text=False, is_in_call=False) == USER


def test_the_floor_looks_no_further_than_it_must() -> None:
    looked = []

    def newest_first() -> Any:
        for tick in range(1000, 0, -1):
            looked.append(tick)
            yield record(tick)

    policy = DeliveryPolicy(quiet_ms=1000)
    assert floor(policy, newest_first(), None, has_text=False, is_in_call=False) == FREE
    assert len(looked) <= 6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("budget_tokens", 0, "budget_tokens: expected at least 1, got 0"),
        ("quiet_ms", -1, "quiet_ms: expected at least 0, got -1"),
        ("speech_rms", 0.0, "speech_rms: expected more than 0 to 1, got 0.0"),
        ("max_chars", 0, "max_chars: expected at least 1, got 0"),
        ("patience_s", -1.0, "patience_s: expected at least 0, got -1.0"),
    ],
)
def test_what_a_policy_refuses(field: str, value: float, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        DeliveryPolicy(**{field: value})  # type: ignore[arg-type]


# Pieces.


@pytest.mark.parametrize("flags", [(), ("silent",)])
@pytest.mark.parametrize("is_error", [False, True])
def test_pieces_hold_the_whole_text_and_the_budget(flags: tuple[str, ...], is_error: bool) -> None:
    numbers = random.Random(3)
    words = ["at", "the", "station", "naïve", "東京", "\\", '"quoted"', "🙂🙂", "x" * 70]
    for _ in range(40):
        text = " ".join(numbers.choices(words, k=numbers.randrange(0, 60)))
        budget = least_budget(count, "background") + numbers.randrange(0, 200)
        pieces = split_result(
            "call-7", "background", text, count, budget, is_error=is_error, flags=flags
        )
        assert all(count(one) <= budget for one in pieces)
        contents = [one.content for one in pieces]
        said = [one if isinstance(one, str) else one["text"] for one in contents]
        assert "".join(said) == text
        marked = [one for one in contents if not isinstance(one, str) and "more" in one]
        assert marked == contents[:-1]
        assert all(one.is_error == is_error and one.name == "background" for one in pieces)


def test_one_piece_is_the_text_itself() -> None:
    (only,) = split_result("call-0", None, "It is noon.", count, 120)
    assert only == ToolResult("call-0", "It is noon.")


def test_the_flag_that_may_come_later_has_room() -> None:
    pieces = split_result("call-0", "background", "word " * 100, count, 120)
    box = outbox()
    one = entry(job(), seen_tick=0)
    one.pieces = pieces
    box.add(one)
    box.note_item(3)
    first = box.take(4, FREE)
    assert first is not None and first.content[OVERTAKEN] is True
    assert count(first) <= 120


def test_a_budget_without_room_for_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"budget_tokens: expected at least .*, got 60"):
        split_result("call-0", "background", "much too long " * 10, count, 60)


# The moment.


def test_when_idle_waits_and_interrupt_does_not() -> None:
    box = outbox()
    idle, urgent = job("job-1"), job("job-2", deliver="interrupt")
    box.add(entry(idle))
    for tick, taken in enumerate((USER, MODEL, Floor(True, True))):
        assert box.take(tick, taken) is None
    assert idle.delivery == "waiting"
    box.add(entry(urgent))
    piece = box.take(3, USER)
    assert piece is not None and piece.call_id == "job-2"
    assert (idle.delivery, urgent.delivery) == ("waiting", "delivered")
    assert box.take(4, FREE) is not None
    assert (idle.delivery, len(box)) == ("delivered", 0)


def test_patience_ends() -> None:
    box = outbox(DeliveryPolicy(patience_s=2.0))
    box.add(entry(job(), ready_tick=5))
    assert box.take(14, USER) is None
    assert box.take(15, USER) is not None


def test_priority_then_age() -> None:
    box = outbox()
    for name, priority in (("job-1", 0), ("job-2", 1), ("job-3", 1)):
        box.add(entry(job(name, priority=priority)))
    order = [box.take(tick, FREE) for tick in range(3)]
    assert [one.call_id for one in order if one] == ["job-2", "job-3", "job-1"]


def test_a_result_that_has_begun_goes_on_but_not_over_the_user() -> None:
    box = outbox()
    long, urgent = job("job-1"), job("job-2", priority=9)
    box.add(entry(long, 3))
    assert box.take(0, FREE) is not None
    assert long.delivery == "entering"
    box.add(entry(urgent))
    # Another result does not come in between, and the model may be speaking about it already.
    second = box.take(1, MODEL)
    assert second is not None and second.content == "piece 1"
    assert box.take(2, USER) is None
    third = box.take(3, MODEL)
    assert third is not None and third.content == "piece 2"
    assert long.delivery == "delivered"


def test_what_waits_too_long_expires_but_not_in_the_middle() -> None:
    box = outbox()
    late, begun = job("job-1"), job("job-2")
    box.add(entry(begun, 2, expires_tick=2))
    assert box.take(2, FREE) is not None
    box.add(entry(late, expires_tick=2))
    assert box.take(9, USER) is None
    assert (late.delivery, begun.delivery) == ("expired", "entering")
    assert box.take(10, FREE) is not None
    assert begun.delivery == "delivered"


# What was undone.


def test_a_rewind_lets_the_undone_pieces_enter_again() -> None:
    box = outbox()
    one = job()
    box.add(entry(one, 3))
    pieces = [box.take(tick, FREE) for tick in (4, 5, 6)]
    assert one.delivery == "delivered"
    box.undo(5, ())
    assert (one.delivery, len(box)) == ("entering", 1)
    assert [box.take(tick, FREE) for tick in (5, 6)] == pieces[1:]
    box.undo(3, ())
    assert one.delivery == "waiting"
    assert [box.take(tick, FREE) for tick in (3, 4, 5)] == pieces


def test_what_the_session_put_back_is_not_handed_twice() -> None:
    box = outbox()
    one = job()
    box.add(entry(one, 2))
    first = box.take(4, FREE)
    assert first is not None
    box.undo(4, (first,))
    second = box.take(4, FREE)
    assert second is not None and second.content == "piece 1"


def test_results_of_undone_calls_are_dropped() -> None:
    box = outbox()
    gone, stays, own = job("job-1", "call-1"), job("job-2", "call-2"), job("job-3")
    for one in (gone, stays, own):
        box.add(entry(one))
    assert box.take(0, FREE) is not None
    assert gone.delivery == "delivered"
    dropped = box.drop_undone(lambda call_id: call_id == "call-2")
    assert dropped == [gone]
    box.undo(0, ())
    assert len(box) == 2
    assert box.drop_undone(lambda _call_id: False) == [stays]
    assert stays.delivery == "dropped"
    assert box.drop_undone(lambda _call_id: False) == []
    box.clear()
    assert (own.delivery, len(box)) == ("dropped", 0)


def test_no_more_than_so_many_wait() -> None:
    box = outbox()
    jobs = [job(f"job-{index}") for index in range(MAX_WAITING + 1)]
    for one in jobs:
        box.add(entry(one))
    assert len(box) == MAX_WAITING
    assert (jobs[-2].delivery, jobs[-1].delivery) == ("waiting", "dropped")


# What was overtaken.


def test_a_result_that_newer_items_overtook_says_so() -> None:
    box = outbox()
    box.add(entry(job(), seen_tick=7))
    box.note_item(7)
    piece = box.take(8, FREE)
    assert piece is not None and piece.content == "piece 0"
    box.add(entry(job(), seen_tick=8))
    box.note_item(9)
    piece = box.take(10, FREE)
    assert piece is not None and piece.content == {"text": "piece 0", "overtaken": True}


def test_another_result_is_a_newer_item() -> None:
    box = outbox()
    box.add(entry(job("job-1"), 2, seen_tick=0))
    box.add(entry(job("job-2"), seen_tick=0))
    pieces = [box.take(tick, FREE) for tick in (1, 2, 3)]
    contents = [one.content for one in pieces if one]
    assert contents == ["piece 0", "piece 1", {"text": "piece 0", "overtaken": True}]


def test_an_undone_item_overtakes_nothing() -> None:
    box = outbox()
    box.add(entry(job(), seen_tick=3))
    box.note_item(6)
    box.undo(5, ())
    piece = box.take(5, FREE)
    assert piece is not None and piece.content == "piece 0"


def test_what_is_looked_at_again_is_held_and_others_go_first() -> None:
    looked: list[Entry] = []

    def recheck(one: Entry) -> bool:
        looked.append(one)
        return True

    box = Outbox(DeliveryPolicy(), recheck)
    first, second = entry(job("job-1"), seen_tick=0), entry(job("job-2"), seen_tick=9)
    box.add(first)
    box.note_item(4)
    assert box.take(5, FREE) is None
    assert looked == [first] and first.is_held
    assert box.take(6, FREE) is None
    box.add(second)
    piece = box.take(7, FREE)
    assert piece is not None and piece.call_id == "job-2"
    box.release(first, 7)
    piece = box.take(8, FREE)
    assert piece is not None and piece.content == "piece 0"
    third = entry(job("job-3"))
    box.add(third)
    box.drop(third)
    box.drop(third)
    assert third.job.delivery == "dropped"
