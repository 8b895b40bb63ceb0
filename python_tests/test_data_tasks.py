"""What each task promises, recomputed from what its script says happens when."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from tml_core import errors
from tml_core.data import (
    SPLITS,
    TASKS,
    Interaction,
    Script,
    SpeechBank,
    interactions,
    tick_at,
    vocabulary,
)
from tml_core.data.figure import WALK_S
from tml_core.data.script import REACTION_TICKS, Spoken, perform
from tml_core.data.sheet import draw_sheet
from tml_core.data.tasks import PERIOD_SECONDS, TIMER_SECONDS
from tml_core.data.tasks.talking import REFUSAL
from tml_core.data.words import CUES, GERMAN, HARMFUL, HARMLESS, LISTS, NUMBERS, SPANISH, WORDS
from tml_core.layout import MicroTurnLayout
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.tokenizer import load_tokenizer

RATE = 16000


@pytest.fixture(scope="module")
def bank() -> Iterator[SpeechBank]:
    with SpeechBank(["espeak", "pico"]) as bank:
        yield bank


@pytest.fixture(scope="module")
def layout() -> MicroTurnLayout:
    path = bundled_path("nano")
    return MicroTurnLayout(ModelConfig.from_path(path), load_tokenizer(path))


def some(task: str, bank: SpeechBank, num: int = 4) -> list[Script]:
    made = [
        one for split in SPLITS for one in interactions(7, split, bank=bank, tasks=[task], num=num)
    ]
    return [one.script for one in made]


def end_of(spoken: Spoken, bank: SpeechBank) -> int:
    return spoken.start + len(perform(spoken, bank).pcm)


def due(script: Script) -> list[tuple[int, str]]:
    return [(one.tick, one.text) for one in script.expected]


def numbers_in(text: str) -> list[int]:
    return [NUMBERS.index(word) for word in text.split() if word in NUMBERS]


def test_reminders_come_until_the_user_says_stop(bank: SpeechBank) -> None:
    for script in some("periodic", bank):
        request, *_, stop = script.spoken
        [seconds] = numbers_in(request.text)
        assert seconds in PERIOD_SECONDS[script.split]
        [word] = set(request.text.split()) & set(WORDS) - {"stop"}
        start, last = end_of(request, bank), tick_at(end_of(stop, bank))
        ticks = [tick_at(start + k * seconds * RATE) for k in range(1, 99)]
        assert due(script) == [(tick, word) for tick in ticks if tick <= last]
        assert len(script.expected) >= 2
        # What would come next falls into the session, so that silence is learned.
        assert ticks[len(script.expected)] < script.num_ticks


def test_seconds_are_counted_between_two_words(bank: SpeechBank) -> None:
    for script in some("stopwatch", bank):
        request, *between, stop = script.spoken
        [go] = [one for one in between if " " not in one.text]
        assert {go.text, stop.text} <= set(request.text.split())
        start, last = end_of(go, bank), tick_at(end_of(stop, bank))
        wanted = [(tick_at(start + k * RATE), str(k)) for k in range(1, 30)]
        assert due(script) == [one for one in wanted if one[0] <= last]
        assert len(script.expected) >= 2


def test_two_clocks_run_at_once(bank: SpeechBank) -> None:
    for script in some("timers", bank):
        request = script.spoken[0]
        numbers = numbers_in(request.text)
        words = [word for word in request.text.split() if word in WORDS]
        assert len(numbers) == len(words) == 2 and set(numbers) <= set(TIMER_SECONDS[script.split])
        end = end_of(request, bank)
        wanted = [(tick_at(end + seconds * RATE)) for seconds in numbers]
        assert [tick for tick, _ in due(script)] == wanted
        assert [text for _, text in due(script)] == words


def test_a_timer_runs_while_a_cue_is_waited_for(bank: SpeechBank) -> None:
    for script in some("armed", bank):
        request = script.spoken[0]
        [seconds] = numbers_in(request.text)
        timer = tick_at(end_of(request, bank) + seconds * RATE)
        texts = dict(due(script))
        assert set(" ".join(texts.values()).split()) <= set(request.text.split())
        assert timer in texts and 1 <= len(texts) <= 2
        [cue] = set(request.text.split()) & set(CUES)
        others = {tick for tick in texts if tick != timer}
        for tick in others:
            heard = [one for one in script.spoken[1:] if cue in one.text.split()]
            assert heard and tick_at(heard[0].start) < tick
            assert tick <= tick_at(end_of(heard[0], bank)) + REACTION_TICKS


@pytest.mark.parametrize("task", ["when", "span"])
def test_what_begins_and_ends_is_told_when_it_can_be_seen(task: str, bank: SpeechBank) -> None:
    for script in some(task, bank):
        assert script.scene is not None
        request = script.spoken[0].text
        ours = [rep for rep in script.scene.reps if rep.action in request and not rep.is_other]
        assert len(ours) >= 2 and len({rep.action for rep in ours}) == 1
        delays = [(one.tick + 1) / 5 for one in script.expected]
        assert 0.6 <= delays[0] - ours[0].start_s <= 0.81
        assert [one.text for one in script.expected] == (
            ["now"] if task == "when" else ["start", "stop"]
        )
        if task == "span":
            assert 0.8 <= delays[1] - ours[-1].end_s <= 1.16
            # No pause between two of them is as long as it takes to know that all are over.
            pairs = pairwise(ours)
            assert all(after.start_s - before.end_s < 0.2 for before, after in pairs)


def test_who_comes_in_is_told_when_seen(bank: SpeechBank) -> None:
    for script in some("appear", bank):
        assert script.scene is not None
        [(start_s, end_s)] = script.scene.visits
        [expected] = script.expected
        assert expected.text in script.spoken[0].text.split()
        assert 0.6 * WALK_S < (expected.tick + 1) / 5 - start_s <= 0.6 * WALK_S + 0.41
        assert (expected.tick + 1) / 5 < end_s


def test_words_are_translated_as_they_are_heard(bank: SpeechBank) -> None:
    for script in some("translate", bank):
        request, *others = script.spoken
        words = SPANISH if "spanish" in request.text else GERMAN
        told = [one.text.split() for one in others if set(one.text.split()) <= words.keys()]
        said = [word for part in told for word in part]
        assert " ".join(one.text for one in script.expected) == " ".join(words[w] for w in said)
    assert len(SPANISH) == len(GERMAN) >= 40 and SPANISH.keys() == GERMAN.keys()


def test_attention_is_shown_at_pauses_only(bank: SpeechBank) -> None:
    for script in some("story", bank):
        told = script.spoken[1:]
        pauses = [
            tick_at(end_of(one, bank) + 6400) + REACTION_TICKS
            for one, after in zip(told, [*told[1:], None], strict=True)
            if after is not None and after.start - end_of(one, bank) > 8000
        ]
        ticks = [one.tick for one in script.expected]
        assert {one.text for one in script.expected} == {"mm"}
        assert set(pauses) <= set(ticks) and len(ticks) <= len(pauses) + 1


def test_an_answer_stops_when_the_user_speaks(bank: SpeechBank) -> None:
    interrupted = 0
    for script in some("recite", bank, num=6):
        request, *more = script.spoken
        [words] = [words for what, words in LISTS.items() if what in request.text]
        said = [one.text for one in script.expected]
        assert tuple(said) == words[: len(said)]
        first = tick_at(end_of(request, bank)) + REACTION_TICKS
        assert [one.tick for one in script.expected] == [first + 2 * i for i in range(len(said))]
        if more:
            interrupted += len(said) < len(words)
            assert script.expected[-1].tick <= tick_at(more[0].start) + REACTION_TICKS
        else:
            assert len(said) == len(words)
    assert interrupted


def test_only_harm_is_refused(bank: SpeechBank) -> None:
    kinds = set()
    for script in some("refuse", bank, num=6):
        [what] = [one for one in (*HARMFUL, *HARMLESS) if one in script.spoken[0].text]
        assert script.expected[0].text == HARMLESS.get(what, REFUSAL)
        kinds.add(what in HARMLESS)
    assert kinds == {True, False}
    assert not set(HARMFUL) & set(HARMLESS)


def test_a_chain_is_one_session_of_several_tasks(bank: SpeechBank, layout: MicroTurnLayout) -> None:
    made: list[Interaction] = list(interactions(1, bank=bank, tasks=["chain"], num=5))
    parts = [{part for part, _ in one.script.requests} for one in made]
    assert all(one <= TASKS.keys() - {"chain"} for one in parts)
    assert sum(len(one.script.requests) for one in made) >= 10
    for one in made:
        script = one.script
        assert len(one.runs(layout)) == script.num_ticks > 100
        has_pictures = [bool(chunk.frames) for chunk in one.chunks]
        assert all(has_pictures) or not any(has_pictures)
        if not any(has_pictures):
            assert not {part for part, _ in script.requests} & {"count", "when", "span", "appear"}
        calls = [result.call_id for _, result in script.results]
        assert calls == [f"call-{index}" for index in range(len(calls))]


def test_nobody_answers_a_television(bank: SpeechBank) -> None:
    for script in some("background_speech", bank):
        assert not script.expected and not script.requests and len(script.spoken) >= 2
        assert all(spoken.level <= 0.4 for spoken in script.spoken)


def test_a_sheet_is_drawn(bank: SpeechBank, tmp_path: Path) -> None:
    for task in ("delegate", "count", "transcribe"):
        one = next(interactions(2, bank=bank, tasks=[task]))
        draw_sheet(one, tmp_path / f"{task}.png")
        with Image.open(tmp_path / f"{task}.png") as sheet:
            width, height = sheet.size
        assert width == 1600 and height >= 240 * -(-one.script.num_ticks // 100)


def test_nano_has_a_token_for_nearly_every_word() -> None:
    tokenizer = load_tokenizer(bundled_path("nano"))
    assert tokenizer is not None
    words = vocabulary()
    several = [word for word in words if len(tokenizer.encode(f" {word}").ids) > 1]
    assert len(words) > 1000 and len(several) < 0.05 * len(words)


def test_requests_may_be_typed() -> None:
    with SpeechBank(["espeak"]) as bank:
        options = {"bank": bank, "tasks": ["timer", "aside"], "num": 24}
        for typed in (0.0, 0.5, 1.0):
            found = list(interactions(5, "train", typed=typed, **options))
            asked = [one.script for one in found if one.script.task == "timer"]
            share = sum(bool(script.typed) for script in asked) / len(asked)
            assert share == typed or 0.1 < share < 0.9
            for script in asked:
                for tick, text in script.typed:
                    assert "second" in text and script.expected[0].tick > tick
            # What is said to others is said.
            assert not any(one.script.typed for one in found if one.script.task == "aside")
        with pytest.raises(errors.InvalidArgument, match=r"typed: expected a share .* got 1.5"):
            next(interactions(5, "train", typed=1.5, **options))
