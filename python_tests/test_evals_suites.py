"""Each suite's rule on items made by hand, with scores worked out by hand."""

import pytest

from evals_kit import TICK, a_scene, an_item, written
from tml_core import errors
from tml_core.data import Expected
from tml_core.evals import SUITES, Call, Item, Mark, Played, Suite, Word
from tml_core.evals.match import match
from tml_core.evals.played import as_number, heard_s, normal_words, utterances
from tml_core.evals.suites import (
    backchannel,
    chosen_suites,
    events,
    interruption,
    localisation,
    refusals,
    sessions,
)

NUM = 60


def value(suite: str, item: Item, played: Played) -> float | None:
    return SUITES[suite].mark(item, played).value


def test_words_go_on_over_ticks_and_end_in_silence() -> None:
    played = Played(("he", "llo wor", "", "ld", "", "it's", " 2%."))
    assert played.words == (
        Word("hello", 0, 1),
        Word("wor", 1, 1),
        Word("ld", 3, 3),
        Word("it's", 5, 5),
        Word("2%", 6, 6),
    )
    assert played.num_writing_ticks == 5
    assert Played(("\ufffd.", "!")).words == ()
    assert normal_words("Stop, NOW!  -") == ["stop", "now"]
    assert heard_s(0) == 0.2


def test_utterances_are_cut_at_pauses() -> None:
    words = written(20, (0, "a"), (4, "b"), (9, "c")).words
    assert [[one.text for one in group] for group in utterances(words)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("word", "number"), [("7", 7), ("seven", 7), ("12", 12), ("tea", None), ("²", None)]
)
def test_numbers_in_digits_and_letters(word: str, number: int | None) -> None:
    assert as_number(word) == number


def test_matching_takes_the_nearest_and_each_word_once() -> None:
    words = written(60, (10, " tea"), (21, " tea"), (40, " tea")).words
    found = match(words, [Expected(20, "tea"), Expected(39, "Tea.")], 3, 3)
    assert [(one.off, one.is_right) for one in found.matches] == [(1, True), (1, True)]
    assert [word.start for word in found.extra] == [10]
    assert not found.is_right


def test_matching_wants_all_words_without_a_long_pause() -> None:
    due = [Expected(5, "blue tea")]
    assert match(written(20, (5, " blue tea")).words, due, 0, 0).is_right
    assert match(written(20, (5, " blue"), (9, " tea")).words, due, 0, 0).is_right
    assert not match(written(20, (5, " blue"), (10, " tea")).words, due, 0, 0).is_right
    assert not match(written(20, (5, " blue oh tea")).words, due, 0, 0).is_right
    assert match(written(20, (5, " tea blue")).words, due, 0, 0).matches[0].off is None


@pytest.mark.parametrize(("off", "is_right"), [(-4, 0.0), (-3, 1.0), (0, 1.0), (3, 1.0), (4, 0.0)])
def test_timespeak_has_a_window_to_both_sides(off: int, is_right: float) -> None:
    item = an_item("timer", NUM, [Expected(30, "tea")], [(0, 6 * TICK)])
    mark = SUITES["timespeak"].mark(item, written(NUM, (30 + off, "tea")))
    assert mark.value == is_right
    assert mark.facts["off"] == [off]
    # Asked at the end of tick 5, due at the end of tick 30: five seconds.
    assert mark.group == "timer 05 s"


@pytest.mark.parametrize("said", [(), ((30, "lunch"),), ((30, "tea"), (40, "tea")), ((2, "oh"),)])
def test_timespeak_wants_the_words_and_nothing_else(said: tuple[tuple[int, str], ...]) -> None:
    item = an_item("timer", NUM, [Expected(30, "tea")])
    assert value("timespeak", item, written(NUM, *said)) == 0.0


@pytest.mark.parametrize(("off", "is_right"), [(-2, 0.0), (-1, 1.0), (4, 1.0), (5, 0.0)])
def test_cuespeak_has_its_window(off: int, is_right: float) -> None:
    item = an_item("cue", NUM, [Expected(30, "tea")], [(0, 50 * TICK)])
    assert value("cuespeak", item, written(NUM, (30 + off, "tea"))) == is_right


def test_cuespeak_wants_it_over_the_users_speech() -> None:
    item = an_item("cue", NUM, [Expected(30, "tea")], [(0, 5 * TICK), (20 * TICK, 32 * TICK)])
    assert value("cuespeak", item, written(NUM, (31, "tea"))) == 1.0
    assert value("cuespeak", item, written(NUM, (32, "tea"))) == 0.0


@pytest.mark.parametrize(
    ("said", "is_right", "answer"),
    [
        (((10, " 1"), (20, " 2"), (30, " 3"), (40, " 4")), 1.0, 4),
        (((10, " one"), (40, " five")), 1.0, 5),
        (((30, " 3"),), 1.0, 3),
        (((30, " 3"), (50, " done")), 1.0, 3),
        (((28, " 4"),), 0.0, 0),  # before the last but one is over
        (((30, " 4"), (40, " 6")), 0.0, 6),
        ((), 0.0, 0),
    ],
)
def test_repcount_takes_the_last_number_after_the_last_but_one(
    said: tuple[tuple[int, str], ...], is_right: float, answer: int
) -> None:
    due = [Expected(10 * k, str(k)) for k in (1, 2, 3, 4)]
    mark = SUITES["repcount"].mark(an_item("count", NUM, due), written(NUM, *said))
    assert (mark.value, mark.facts["said"]) == (is_right, answer)


def test_repcount_tells_exact_counts_and_errors() -> None:
    suite = SUITES["repcount"]
    due = [Expected(10 * k, str(k)) for k in (1, 2, 3)]
    right = suite.mark(an_item("count", NUM, due), written(NUM, (11, "1"), (30, "3")))
    wrong = suite.mark(an_item("count", NUM, due), written(NUM, (31, "4")))
    silent = suite.mark(an_item("count", NUM, due), written(NUM))
    score = suite.score([right, wrong, silent])
    assert score.value == pytest.approx(2 / 3)
    assert score.extras["exact"] == pytest.approx(1 / 3)
    assert score.extras["mean error"] == pytest.approx((0 + 1 + 3) / 3.1 / 3)
    assert score.extras["each in time"] == pytest.approx(2 / 9)
    assert score.extras["always 5"] == 0.0


def test_others_wants_silence_and_no_call() -> None:
    item = an_item("aside", NUM)
    assert value("others", item, written(NUM)) == 1.0
    assert value("others", item, written(NUM, (30, "."))) == 0.0
    assert value("others", item, Played(("",) * NUM, (Call(3, "background", {}),))) == 0.0


def test_turntaking_is_from_the_end_of_speech_and_never_negative() -> None:
    suite = SUITES["turntaking"]
    item = an_item("echo", NUM, [Expected(11, "tea")], [(0, 10 * TICK + 1600)])
    late = suite.mark(item, written(NUM, (11, "tea")))
    early = suite.mark(item, written(NUM, (2, "tea")))
    silent = suite.mark(item, written(NUM))
    assert late.value == pytest.approx(0.3)  # 2.4 s less 2.1 s
    assert early.value == 0.0
    assert silent.value is None
    score = suite.score([late, late, early, silent])
    assert score.value == pytest.approx(0.3)
    assert score.num_items == 3
    assert score.extras == {
        "turns taken": 0.75,
        "mean s": pytest.approx(0.2),
        "before the end": pytest.approx(1 / 3),
    }
    assert suite.score([silent]).value is None


def test_false_alarms_are_what_begins_while_nothing_is_due() -> None:
    suite = SUITES["falsealarms"]
    item = an_item("echo", 100, [Expected(50, "tea")])
    # Due from tick 49 to 59: 89 ticks of silence, 17.8 s.
    quiet = suite.mark(item, written(100, (49, "tea"), (59, "tea"), (62, "tea")))
    assert (quiet.value, quiet.weight) == (0.0, pytest.approx(17.8 / 60))
    loud = suite.mark(item, written(100, (3, "oh"), (5, "oh"), (10, "oh"), (64, "no")))
    assert loud.value == 3.0
    assert loud.facts["alarm_ticks"] == [3, 10, 64]
    score = suite.score([quiet, loud])
    assert score.value == pytest.approx(3 * 60 / 35.6)
    assert score.low is not None
    assert score.high is not None
    assert score.low < score.value < score.high


def test_false_alarms_count_calls_that_nobody_asked_for() -> None:
    suite = SUITES["falsealarms"]
    call = Call(40, "background", {"request": "tea"})
    assert suite.mark(an_item("aside", NUM), Played(("",) * NUM, (call,))).value == 1.0
    due = [Expected(25, call=("background", {"request": "tea"}))]
    assert suite.mark(an_item("delegate", NUM, due), Played(("",) * NUM, (call,))).value == 0.0


@pytest.mark.parametrize(
    ("calls", "is_right"),
    [
        ([(16, "background", {"request": "time in Tokyo"})], 1.0),
        ([(30, "background", {"request": "time in tokyo"})], 1.0),
        ([(31, "background", {"request": "time in tokyo"})], 0.0),
        ([(9, "background", {"request": "time in tokyo"})], 0.0),
        ([(16, "background", {"request": "time in oslo"})], 0.0),
        ([(16, "search", {"request": "time in tokyo"})], 0.0),
        ([(16, "background", {"request": "time in tokyo", "job_id": 1})], 0.0),
        ([(16, "background", {"request": "time in tokyo"})] * 2, 0.0),
        ([], 0.0),
    ],
)
def test_delegate_wants_the_call_once_and_in_time(
    calls: list[tuple[int, str, dict[str, object]]], is_right: float
) -> None:
    due = [Expected(10, call=("background", {"request": "time in tokyo"})), Expected(45, "9 pm")]
    played = Played(written(NUM, (46, "9 pm")).texts, tuple(Call(*one) for one in calls), (40,))
    mark = SUITES["delegate"].mark(an_item("delegate", NUM, due), played)
    assert mark.value == is_right
    assert mark.facts["is_answered"] is True


def test_a_result_that_never_came_is_nobodys_fault() -> None:
    due = [Expected(10, call=("background", {})), Expected(45, "9 pm")]
    suite = SUITES["delegate"]
    played = Played(("",) * NUM, (), (None,))
    mark = suite.mark(an_item("delegate", NUM, due), played)
    assert mark.facts["is_answered"] is None
    assert suite.score([mark]).extras == {}


def test_transcribe_counts_words_and_how_late_they_come() -> None:
    suite = SUITES["transcribe"]
    due = [Expected(5, "the red"), Expected(7, "house"), Expected(9, "burns")]
    item = an_item("transcribe", NUM, due)
    late = suite.mark(item, written(NUM, (5, "the"), (8, " red horse"), (20, " burns")))
    assert (late.value, late.weight, late.group) == (1.0, 4.0, "espeak")
    assert late.facts["late"] == [0, 3, 11]
    silent = suite.mark(item, written(NUM))
    chatty = suite.mark(item, written(NUM, (5, "the red house burns oh no no no no")))
    assert (silent.value, chatty.value) == (4.0, 5.0)
    score = suite.score([late, silent, chatty])
    assert score.value == pytest.approx(10 / 12)
    assert score.extras["words within 1 s"] == pytest.approx(4 / 12)
    assert score.extras["median late s"] == 0.0


@pytest.mark.parametrize(
    ("said", "pauc"),
    [
        ((), 0.25),
        # At 6.0 s, 1 s after the begin of 4 s, which counts as half a second.
        (((29, "now"),), (0.5 * 0.5 + 3.5 * 2) / 8),
        (((29, "now"), (34, "oh")), (0.5 * 0.5 + 0.5 * 2 + 3.0 * 1) / 8),
        (((29, "oh"),), 0.5 * 0.5 / 8),
        (((29, "oh"), (34, "now")), (0.5 * 0.5 + 0.5 * 0 + 3.0 * 1) / 8),
        # Too early it is wrong from the begin on, and half right once it is said again.
        (((9, "now"),), 0.0),
        (((9, "now"), (29, "now")), (0.5 * 0 + 3.5 * 1) / 8),
        (((54, "now"),), 0.25),  # over
    ],
)
def test_events_are_scored_by_the_curve(said: tuple[tuple[int, str], ...], pauc: float) -> None:
    scene = a_scene(
        ("waves", 2.0, 3.0, False),
        ("side kicks", 4.4, 5.2, True),  # somebody else
        ("side kicks", 5.0, 7.0, False),
        ("side kicks", 7.1, 9.0, False),
        ("waves", 9.5, 10.5, False),
    )
    item = an_item("when", NUM, [Expected(28, "now")], scene=scene)
    mark = events.SUITE.mark(item, written(NUM, *said))
    assert mark.facts["span_s"] == [5.0, 9.0]
    assert mark.value == pytest.approx(pauc)


def test_a_visit_is_an_event() -> None:
    item = an_item("appear", NUM, [Expected(28, "tea")], scene=a_scene(visits=((5.0, 9.0),)))
    mark = events.SUITE.mark(item, written(NUM, (29, "tea")))
    assert mark.value == pytest.approx((0.5 * 0.5 + 3.5 * 2) / 8)
    assert mark.facts["late_s"] == 1.0


@pytest.mark.parametrize(
    ("said", "iou"),
    [
        (((24, "start"), (44, "stop")), 1.0),
        (((29, "start"), (49, "stop")), 3.0 / 5.0),
        (((4, "stop"), (29, "start"), (39, "stop"), (49, "stop")), 2.0 / 4.0),
        (((29, "start"),), 0.0),
        (((29, "stop"),), 0.0),
        ((), 0.0),
    ],
)
def test_localisation_is_the_overlap(said: tuple[tuple[int, str], ...], iou: float) -> None:
    scene = a_scene(("waves", 5.0, 7.0, False), ("waves", 7.0, 9.0, False))
    item = an_item("span", NUM, [Expected(28, "start"), Expected(49, "stop")], scene=scene)
    mark = localisation.SUITE.mark(item, written(NUM, *said))
    assert mark.value == pytest.approx(iou)
    score = localisation.SUITE.score([mark])
    assert score.extras["IoU over 0.5"] == float(iou >= 0.5)


DAYS = [Expected(10, "monday"), Expected(12, "tuesday"), Expected(14, "wednesday")]


@pytest.mark.parametrize(
    ("said", "is_right", "stop_s"),
    [
        (((10, "monday"), (12, " tuesday"), (14, " wednesday")), 1.0, 0.5),
        (((10, "monday"),), 1.0, 0.0),
        (((10, "monday"), (17, " tuesday")), 1.0, 1.1),
        (((10, "monday"), (18, " tuesday")), 0.0, 1.3),
        (((10, "tuesday"),), 0.0, 0.0),
        (((14, "monday"),), 0.0, 0.5),  # begun after the user
        ((), 0.0, None),
    ],
)
def test_an_interrupted_answer_stops(
    said: tuple[tuple[int, str], ...], is_right: float, stop_s: float | None
) -> None:
    spans = [(0, 9 * TICK), (12 * TICK + 1600, 20 * TICK)]
    mark = interruption.SUITE.mark(an_item("recite", NUM, DAYS, spans), written(NUM, *said))
    assert (mark.group, mark.value) == ("interrupted", is_right)
    assert mark.facts["stop_s"] == (None if stop_s is None else pytest.approx(stop_s))


@pytest.mark.parametrize("spans", [[(0, 9 * TICK)], [(0, 9 * TICK), (17 * TICK, 20 * TICK)]])
def test_an_answer_nobody_interrupts_comes_whole(spans: list[tuple[int, int]]) -> None:
    item = an_item("recite", NUM, DAYS, spans)
    whole = ((10, "monday"), (13, " tuesday"), (16, " wednesday"))
    for said, is_right in ((whole, 1.0), (whole[:2], 0.0), ((*whole, (20, " oh")), 0.0)):
        mark = interruption.SUITE.mark(item, written(NUM, *said))
        assert (mark.group, mark.value) == ("left alone", is_right)


def test_backchannels_are_right_over_due_or_given() -> None:
    suite = backchannel.SUITE
    item = an_item("story", NUM, [Expected(10, "mm"), Expected(30, "mm"), Expected(50, "mm")])
    perfect = suite.mark(item, written(NUM, (8, "mm"), (33, "mm"), (50, "mm")))
    late = suite.mark(item, written(NUM, (8, "mm"), (34, "mm"), (55, "oh")))
    silent = suite.mark(item, written(NUM))
    assert perfect.value == 1.0
    assert late.value == pytest.approx(1 / 5)  # one of three; one late and one that is not due
    assert silent.value == 0.0
    assert suite.score([perfect, late]).extras == {
        "of those due": pytest.approx(4 / 6),
        "others a story": 1.0,
    }


def test_refusals_weigh_both_kinds_alike() -> None:
    suite = refusals.SUITE
    bad = an_item("refuse", NUM, [Expected(10, "i cannot help with that")])
    good = an_item("refuse", NUM, [Expected(10, "with flour")])
    said = written(NUM, (10, "i cannot"), (11, " help wi"), (12, "th that"))
    marks = [suite.mark(bad, said), suite.mark(bad, said), suite.mark(good, said)]
    assert [one.value for one in marks] == [1.0, 1.0, 0.0]
    assert suite.score(marks).value == 0.5


def test_sessions_count_right_words() -> None:
    suite = sessions.SUITE
    item = an_item("chain", NUM, [Expected(10, "blue tea"), Expected(30, "4")])
    mark = suite.mark(item, written(NUM, (10, "blue tea"), (40, " 4"), (50, " oh")))
    # Two of three in time; said four, so five words were due or said.
    assert (mark.value, mark.weight) == (2.0, 5.0)
    assert suite.score([mark]).value == 0.4


def test_a_score_has_groups_only_where_there_are_several() -> None:
    suite = SUITES["echo"]
    item = an_item("echo", NUM, [Expected(11, "tea")])
    facts = suite.mark(item, written(NUM, (11, "tea"))).facts
    marks = [Mark(1.0, "a", facts=facts), Mark(0.0, "a", facts=facts), Mark(1.0, "b", facts=facts)]
    score = suite.score(marks)
    assert score.value == 0.75
    assert score.groups == {"a": (0.5, 2), "b": (1.0, 1)}
    assert suite.score(marks[:2]).groups == {}
    assert suite.score([]).value is None


def test_what_is_shown_and_what_is_reached() -> None:
    latency, accuracy = SUITES["turntaking"], SUITES["timespeak"]
    assert (latency.show(0.4), accuracy.show(0.855)) == ("0.40 s", "85.5%")
    assert accuracy.show(None) == "none"
    assert latency.reaches(0.4) and not latency.reaches(0.41)
    assert accuracy.reaches(0.85) and not accuracy.reaches(0.84)
    assert SUITES["echo"].reaches(1.0) is None
    assert accuracy.reaches(None) is None


def test_suites_are_chosen_by_name() -> None:
    assert chosen_suites("all") == list(SUITES.values())
    assert [one.name for one in chosen_suites(["echo", "timespeak"])] == ["timespeak", "echo"]
    assert all(isinstance(one, Suite) for one in chosen_suites("sum"))
    with pytest.raises(errors.InvalidArgument, match=r"suites: expected 'all' or .*got 'tea'"):
        chosen_suites("tea")
