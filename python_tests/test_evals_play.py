"""Playing: scripted players get what they must, and the engine plays as live sessions do."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evals_kit import TICK, ChattyPlayer, ScriptedPlayer
from session_kit import Script, nano, step_by_step
from tml_core import Engine, Session, errors
from tml_core.cli import eval as command
from tml_core.cli.eval import EvalOptions, as_split, markdown, run_eval
from tml_core.data import Interaction, SpeechBank
from tml_core.evals import SUITES, Item, ModelPlayer, Report, SilentPlayer, evaluate, make_items
from tml_core.layout import MicroTurnLayout

ENGINES = ["espeak", "pico"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpeechBank]:
    with SpeechBank(ENGINES, tmp_path_factory.mktemp("speech")) as bank:
        yield bank


pytestmark = pytest.mark.usefixtures("nothing_leaks")


def scores(report: Report) -> dict[str, float | None]:
    return {name: score.value for name, score in report.scores.items()}


def test_a_perfect_player_gets_everything(bank: SpeechBank) -> None:
    report = evaluate(ScriptedPlayer(), "all", 1, seed=1, bank=bank)
    found = scores(report)
    latency = found.pop("turntaking")
    assert latency is not None
    assert 0.2 <= latency <= 0.4  # a reaction takes one tick
    for name in ("falsealarms", "transcribe", "translate"):
        assert found.pop(name) == 0.0
    # What is told of a movement is told once it has been seen.
    assert 0.8 < (found.pop("events") or 0.0) < 1.0
    assert 0.5 < (found.pop("localisation") or 0.0) < 1.0
    assert found == dict.fromkeys(found, 1.0)
    assert report.engines == ("espeak", "pico")
    tasks = {one.key.partition("/")[0] for one in report.records}
    assert len(report.records) == len(tasks)


@pytest.mark.parametrize("off", [-8, 12])
def test_early_and_late_players_get_nothing_for_moments(bank: SpeechBank, off: int) -> None:
    player = ScriptedPlayer("off", off)
    found = scores(evaluate(player, ["timespeak", "cuespeak"], 3, bank=bank))
    assert found == {"timespeak": 0.0, "cuespeak": 0.0}


def test_a_chatty_player_is_wrong_and_alarms(bank: SpeechBank) -> None:
    found = scores(evaluate(ChattyPlayer(), ["timespeak", "others", "falsealarms"], 2, bank=bank))
    assert (found["timespeak"], found["others"]) == (0.0, 0.0)
    assert found["falsealarms"] is not None
    assert found["falsealarms"] > 10  # one every second, where nothing is due


def test_silence_gets_what_silence_is_worth(bank: SpeechBank) -> None:
    found = scores(evaluate(SilentPlayer(), "all", 1, bank=bank))
    assert (found.pop("falsealarms"), found.pop("turntaking")) == (0.0, None)
    assert (found.pop("others"), found.pop("events")) == (1.0, 0.25)
    assert (found.pop("transcribe"), found.pop("translate")) == (1.0, 1.0)
    assert found == dict.fromkeys(found, 0.0)


def test_reports_are_the_same_for_a_seed(bank: SpeechBank, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    again = [
        evaluate(
            ScriptedPlayer(),
            ["echo", "sum"],
            2,
            5,
            bank=bank,
            watch=lambda *at: seen.append(at[1:]),
        )
        for _ in range(2)
    ]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    assert again[0].records == again[1].records
    assert again[0].scores == again[1].scores
    other = evaluate(ScriptedPlayer(), ["echo", "sum"], 2, 6, bank=bank)
    assert [one.expected for one in other.records] != [one.expected for one in again[0].records]
    again[0].write(tmp_path / "one.json")
    read = json.loads((tmp_path / "one.json").read_text())
    assert [one["key"] for one in read["records"]] == ["echo/0", "echo/1", "sum/0", "sum/1"]
    assert read["scores"]["echo"]["value"] == 1.0
    assert read["engines"] == ENGINES


def test_the_training_split_is_for_choosing(bank: SpeechBank) -> None:
    report = evaluate(SilentPlayer(), "echo", 2, 9, split="train", bank=bank)
    voices = {one.voice for one in report.records}
    assert report.split == "train"
    assert not voices & {"espeak/en-029+f4", "espeak/en-gb-scotland+m7", "pico/en-GB"}


def test_requests_may_be_typed_to_tell_hearing_from_doing(bank: SpeechBank) -> None:
    suites = ["timespeak", "cuespeak", "echo", "turntaking", "interruption", "refusals"]
    report = evaluate(ScriptedPlayer(), suites, 2, seed=1, typed=1.0, bank=bank)
    found = scores(report)
    assert (latency := found.pop("turntaking")) is not None and 0.0 <= latency <= 0.4
    assert found == dict.fromkeys(found, 1.0)
    assert report.to_dict()["typed"] == 1.0
    assert not any(one.voice for one in report.records if one.key.startswith("echo"))


def test_refusals(bank: SpeechBank) -> None:
    with pytest.raises(errors.InvalidArgument, match="num_items: expected at least 1, got 0"):
        evaluate(SilentPlayer(), "echo", 0, bank=bank)
    with pytest.raises(errors.InvalidArgument, match=r"split: expected one of .*got 'test'"):
        evaluate(SilentPlayer(), "echo", 1, split="test", bank=bank)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="num_sessions: expected 1 to 12"):
        ModelPlayer(nano(), num_sessions=13)


def sampled(items: list[Item]) -> list[int]:
    """What a perfect model would sample, item by item."""
    layout = MicroTurnLayout(nano().config, nano().tokenizer)
    tokens: list[int] = []
    for item in items:
        for run in Interaction(item.script, item.chunks).runs(layout):
            tokens += run
    return tokens


@contextmanager
def sampling(tokens: list[int]) -> Iterator[None]:
    """The sampler gives ``tokens``, but for the engine's warm-up."""
    with pytest.MonkeyPatch.context() as patch:
        script, opened = Script(tokens), Engine.open

        def after_warm_up(engine: Engine, **options: Any) -> Session:
            assert engine.num_sessions >= 0  # waits for it
            step_by_step(patch)
            patch.setattr(nano().backbone, "sample", script)
            return opened(engine, **options)

        patch.setattr(Engine, "open", after_warm_up)
        yield


def test_a_perfect_model_in_the_real_engine(bank: SpeechBank) -> None:
    names = ["cuespeak", "echo", "delegate"]
    items = list(make_items(2, "held_out", ["cue", "echo", "delegate"], 2, bank))
    with sampling(sampled(items)):
        report = evaluate(ModelPlayer(nano(), num_sessions=1), names, 2, 2, bank=bank)
    assert scores(report) == dict.fromkeys(names, 1.0)
    assert report.scores["delegate"].extras == {"results said in time": 1.0}


def test_the_score_does_not_depend_on_who_shared_the_steps(bank: SpeechBank) -> None:
    alone, together = (
        evaluate(ModelPlayer(nano(), num_sessions=num), "echo", 3, bank=bank) for num in (1, 3)
    )
    assert alone.records == together.records
    assert any(one.said for one in alone.records)


def test_without_a_clock_quiet_ticks_leave_no_trace(
    bank: SpeechBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    (item,) = make_items(4, "held_out", ["timer"], 1, bank)
    assert nano().config.interaction is not None
    silence = nano().config.interaction.tokens.silence
    ends: list[int] = []
    close = Session.close

    def note(session: Session) -> None:
        ends.append(session.tip)
        close(session)

    monkeypatch.setattr(Session, "close", note)
    for has_clock in (True, False):
        # It is asked in every tick either way.
        with sampling([silence] * item.script.num_ticks):
            player = ModelPlayer(nano(), num_sessions=1, has_clock=has_clock)
            ((_, played),) = player.play([item])
        assert played.num_writing_ticks == 0
        assert len(played.texts) == item.script.num_ticks
    # Kept is what overlaps speech, or the two ticks after it.
    num_kept = sum(
        any(start < (tick + 1) * TICK and tick * TICK < end + 2 * TICK for start, end in item.spans)
        for tick in range(item.script.num_ticks)
    )
    assert ends[1] / ends[0] == num_kept / item.script.num_ticks


def test_the_command_shows_and_writes(
    bank: SpeechBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "load_model", lambda *_, **__: nano())
    monkeypatch.setattr(command, "SpeechBank", lambda **_: _Open(bank))
    console = Console(file=io.StringIO(), width=160)
    options = EvalOptions(
        suites=("echo",), num_items=1, baselines=("silent",), num_sessions=2, out=tmp_path / "new"
    )
    reports = run_eval(options, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "words repeated" in shown
    assert "nano is untrained" in shown
    assert [one.player for one in reports] == ["nano", "silent"]
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["eval.png", "nano.json", "silent.json"]
    table = markdown(reports).splitlines()
    assert table[0] == "| suite | nano | silent | aim |"
    assert table[2].startswith("| echo: words repeated | 0.0% [0.0, 79.3] | 0.0% [0.0, 79.3] |")
    with pytest.raises(errors.InvalidArgument, match=r"baselines: expected some of .*got 'tea'"):
        run_eval(EvalOptions(baselines=("tea",)), console)
    with pytest.raises(errors.InvalidArgument, match=r"split: expected one of .*got 'tea'"):
        as_split("tea")
    assert as_split("train") == "train"


class _Open:
    """A bank that somebody else closes."""

    def __init__(self, bank: SpeechBank) -> None:
        self._bank = bank

    def __enter__(self) -> SpeechBank:
        return self._bank

    def __exit__(self, *_: object) -> None:
        pass


def test_every_suite_has_a_name_and_an_aim_with_a_direction() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name
        assert suite.title
        if suite.aim is not None:
            assert suite.reaches(suite.aim)
