"""The stream: the same in every process, labels where the clock says, nothing leaks, all packs."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from string import Formatter

import numpy as np
import pytest
import torch

from byte_model import BYTE_MODEL
from tml_core import errors
from tml_core.data import (
    SPLITS,
    TASKS,
    Expected,
    Interaction,
    Phrasings,
    Script,
    SpeechBank,
    Spoken,
    interaction,
    interactions,
    render_script,
    tick_at,
    voices,
)
from tml_core.data import bank as bank_module
from tml_core.data.augment import Sound
from tml_core.data.engines import Voice
from tml_core.data.script import REACTION_TICKS, perform
from tml_core.data.sentences import Sentences, number_words
from tml_core.data.tasks import PERIOD_SECONDS, TIMER_SECONDS, is_held_out_sum, pieces
from tml_core.data.words import CHATTER, CUES, NAMES, NUMBERS, WORDS
from tml_core.layout import MicroTurnLayout, Stream, TextToken, ToolCall
from tml_core.media import TICK_SAMPLES
from tml_core.model.config import ModelConfig
from tml_core.model.tokenizer import load_tokenizer
from tml_core.ops.linear_logp import IGNORED_TARGET
from tml_core.train import PackedBatch, ShardReader, write_shards

ENGINES = ["espeak", "pico"]  # what the wheels bring: flite may not be here
CLEAN = Sound(gain_db=0.0, snr_db=300.0, slope=0.0, rt60_s=0.0, echo_db=0.0, seed=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speech")


@pytest.fixture(scope="module")
def bank(cache: Path) -> Iterator[SpeechBank]:
    with SpeechBank(ENGINES, cache) as bank:
        yield bank


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_path(BYTE_MODEL)


@pytest.fixture(scope="module")
def layout(config: ModelConfig) -> MicroTurnLayout:
    return MicroTurnLayout(config, load_tokenizer(BYTE_MODEL))


def some(task: str, bank: SpeechBank, num: int = 6) -> list[Interaction]:
    return [
        one for split in SPLITS for one in interactions(5, split, bank=bank, tasks=[task], num=num)
    ]


def digest(one: Interaction) -> str:
    value = hashlib.sha256(repr(one.script).encode())
    for chunk in one.chunks:
        assert chunk.audio is not None
        value.update(chunk.audio.tobytes())
        for frame in chunk.frames:
            value.update(frame.tobytes())
    return value.hexdigest()


def heard_until(one: Interaction, index: int, bank: SpeechBank) -> int:
    """The sample after the last that sounds of what was said as number ``index``."""
    script = one.script
    alone = replace(
        script, spoken=(script.spoken[index],), sound=CLEAN, scene=None, results=(), expected=()
    )
    pcm_S = np.concatenate([chunk.audio for chunk in render_script(alone, bank).chunks])
    return int(np.flatnonzero(np.abs(pcm_S) > 1e-4)[-1]) + 1


@pytest.mark.parametrize(
    ("sample", "tick"), [(0, 0), (1, 0), (3200, 0), (3201, 1), (6400, 1), (16000, 4), (16001, 5)]
)
def test_a_tick_speaks_when_it_has_been_heard(sample: int, tick: int) -> None:
    assert tick_at(sample) == tick
    assert sample <= (tick + 1) * TICK_SAMPLES < sample + TICK_SAMPLES or sample == 0


def test_every_process_makes_the_same(bank: SpeechBank) -> None:
    program = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_data_interactions import ENGINES, digest
from tml_core.data import SpeechBank, interaction
with SpeechBank(ENGINES) as bank:
    made = {f"{split} {i}": digest(interaction(9, i, split, bank=bank))
            for split in ("held_out", "train") for i in (6, 3, 0, 1)}
print(json.dumps(made))
"""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program, here], capture_output=True, check=True, text=True
    )
    others = json.loads(done.stdout)  # without a cache, in another order
    for split in SPLITS:
        for index, one in enumerate(interactions(9, split, bank=bank, num=7)):
            if index in (0, 1, 3, 6):
                assert digest(one) == others[f"{split} {index}"]


def test_seed_index_and_split_all_matter(bank: SpeechBank) -> None:
    made = [
        interaction(seed, index, split, bank=bank, tasks=["echo"])
        for seed in (0, 1)
        for index in (0, 1)
        for split in SPLITS
    ]
    assert len({digest(one) for one in made}) == 8
    later = list(interactions(1, bank=bank, tasks=["echo"], start=1, num=1))
    assert [digest(one) for one in later] == [digest(made[6])]


def test_the_stream_has_no_end_and_every_task(
    bank: SpeechBank, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [one.script.task for one in islice(interactions(0, bank=bank), 30)]
    assert set(tasks) <= set(TASKS) and len(set(tasks)) > 8
    assert 3 < tasks.count("transcribe") < 17  # three in ten
    monkeypatch.setenv("TML_CACHE", str(cache))
    own = list(interactions(0, num=1, tasks=["echo"]))  # with a bank of its own
    assert own[0].script.task == "echo" and bank_module.cache_folder().is_dir()


def test_timers_fall_into_the_tick_that_ends_after_them(bank: SpeechBank) -> None:
    for one in some("timer", bank):
        request = one.script.spoken[0].text
        [seconds] = [NUMBERS.index(word) for word in request.split() if word in NUMBERS]
        due = heard_until(one, 0, bank) + 16000 * seconds
        [expected] = one.script.expected
        # Never early, and less than a tick late; a sample of the last sound may be too quiet.
        assert -20 < (expected.tick + 1) * TICK_SAMPLES - due < TICK_SAMPLES + 20
        assert expected.text in request.split()
        assert seconds in TIMER_SECONDS[one.script.split]


@pytest.mark.parametrize("task", ["echo", "sum"])
def test_answers_come_one_tick_after_the_request(task: str, bank: SpeechBank) -> None:
    for one in some(task, bank):
        [expected] = one.script.expected
        end = heard_until(one, 0, bank)
        latency = (expected.tick + 1) * TICK_SAMPLES - end
        assert TICK_SAMPLES <= latency <= 2 * TICK_SAMPLES + 20
        request = one.script.spoken[0].text
        if task == "echo":
            assert request.endswith(expected.text) and len(expected.text.split()) == 2
        else:
            a, b = (NUMBERS.index(word) for word in request.split() if word in NUMBERS)
            assert expected.text == str(a + b)
            assert is_held_out_sum(a, b) == (one.script.split == "held_out")


def test_cues_are_answered_where_they_are_said(bank: SpeechBank) -> None:
    engines = set()
    for one in some("cue", bank, num=10):
        request, *rest = one.script.spoken
        [expected] = one.script.expected
        words = set(request.text.split())
        assert expected.text in words & set(WORDS)
        [cue] = words & set(CUES)
        engines.add(request.voice.engine)
        # The cue, then what is said in the same breath; the other word is not in the request.
        marks = []
        for spoken, after in zip(rest, [*rest[1:], None], strict=True):
            speech, text = perform(spoken, bank), spoken.text.split()
            cues = [i for i, word in enumerate(text) if word == cue]
            if not cues:
                continue
            if cues[-1] + 1 < len(text):
                assert speech.words is not None
                marks.append(spoken.start + speech.words[cues[-1] + 1])
            else:
                assert after is not None and after.start == spoken.start + len(speech.pcm)
                marks.append(after.start)
        assert expected.tick in [tick_at(mark) + REACTION_TICKS for mark in marks]
        assert (expected.tick + 1) * TICK_SAMPLES < one.script.num_ticks * TICK_SAMPLES
    assert engines == set(ENGINES)


def test_every_word_is_written_in_the_tick_after_it_was_heard(
    bank: SpeechBank, layout: MicroTurnLayout
) -> None:
    engines = set()
    for one in some("transcribe", bank, num=8):
        script = one.script
        (typed_at, request), *stops = script.typed
        ends_at = stops[0][0] * TICK_SAMPLES if stops else script.num_ticks * TICK_SAMPLES
        dictated = [spoken for spoken in script.spoken if spoken.start < ends_at]
        assert one.chunks[typed_at].text == request == script.phrasing
        due: dict[int, list[str]] = {}
        for spoken in dictated:
            assert spoken.start > (typed_at + 1) * TICK_SAMPLES
            speech, words = perform(spoken, bank), spoken.text.split()
            engines.add(spoken.voice.engine)
            length = len(speech.pcm)
            ends = [length] * len(words) if speech.words is None else [*speech.words[1:], length]
            assert speech.words is not None or len(words) <= 3
            for word, end in zip(words, ends, strict=True):
                due.setdefault(tick_at(spoken.start + end) + REACTION_TICKS, []).append(word)
        assert {e.tick: e.text for e in script.expected} == {
            tick: " ".join(words) for tick, words in due.items()
        }
        # No word begins later than what is spelled before it lasts, and none is lost.
        written = [
            layout.codec.decode(t for t in run if layout.grammar.is_text[t])
            for run in one.runs(layout)
        ]
        assert "".join(written) == "".join(f" {spoken.text}" for spoken in dictated)
        for tick in due:
            assert written[tick]
    assert engines == set(ENGINES)


def test_pieces_come_again_in_another_order(bank: SpeechBank, layout: MicroTurnLayout) -> None:
    made = list(interactions(5, bank=bank, tasks=["pieces"], num=12))
    said: dict[Voice, list[str]] = {}
    for one in made:
        for spoken in one.script.spoken:
            said.setdefault(spoken.voice, []).append(spoken.text)
        text = " ".join(spoken.text for spoken in one.script.spoken)
        assert not any(spoken.is_once for spoken in one.script.spoken)
        assert all(1 <= len(spoken.text.split()) <= 3 for spoken in one.script.spoken)
        assert " ".join(due.text for due in one.script.expected) == text
        runs = one.runs(layout)
        written = [token for run in runs for token in run if layout.grammar.is_text[token]]
        assert layout.codec.decode(written) == f" {text}"
    # What a voice may say is a short list, whoever asks.
    others = [task for task in TASKS.values() if task.name not in ("transcribe", "pieces")]
    sentences = Sentences([text for task in others for text in task.phrasings.train])
    for voice, texts in said.items():
        known = {pieces._piece(sentences, voice, number) for number in range(pieces._NUM_PIECES)}
        assert set(texts) <= known and len(known) > 150


def test_what_is_dictated_covers_every_request() -> None:
    others = [task for task in TASKS.values() if task.name not in ("transcribe", "pieces")]
    sentences = Sentences([text for task in others for text in task.phrasings.train])
    rng = np.random.default_rng(0)
    drawn = {word for _ in range(9000) for word in sentences.draw(rng).split()}
    assert set(sentences.words) <= drawn and "fifty" in drawn
    known = set(sentences.words)
    for task in others:
        for text in task.phrasings.train:
            literal = "".join(part for part, *_ in Formatter().parse(text))
            assert set(literal.split()) <= known
    assert set(NUMBERS) | set(" ".join((*WORDS, *CUES, *NAMES, *CHATTER)).split()) <= known
    assert not {"waves", "kicks"} & known and len(known) > 800


def test_numbers_are_said_as_people_do() -> None:
    told = [number_words(value) for value in (0, 13, 20, 47, 100, 305, 1000, 9112)]
    assert told == [
        *("zero", "thirteen", "twenty", "forty seven", "one hundred", "three hundred and five"),
        *("one thousand", "nine thousand one hundred and twelve"),
    ]


def test_what_is_not_for_the_model_is_met_with_silence(
    bank: SpeechBank, layout: MicroTurnLayout
) -> None:
    silence = layout.grammar.tokens.silence
    for one in some("aside", bank):
        assert not one.script.expected and len(one.script.spoken) >= 2
        assert one.runs(layout) == [[silence]] * one.script.num_ticks
        first, *others = one.script.spoken
        assert all(other.voice.name != first.voice.name for other in others)
        assert all(other.level <= 0.5 for other in others)


def test_counts_follow_the_movements(bank: SpeechBank) -> None:
    distracted = 0
    for one in some("count", bank, num=8):
        scene = one.script.scene
        assert scene is not None
        [action] = {rep.action for rep in scene.reps if rep.action in one.script.spoken[0].text}
        ours = [rep for rep in scene.reps if rep.action == action and not rep.is_other]
        distracted += len(ours) < len(scene.reps)
        ends = [tick_at(round(rep.end_s * 16000)) + REACTION_TICKS for rep in ours]
        assert [(e.tick, e.text) for e in one.script.expected] == [
            (tick, str(number)) for number, tick in enumerate(ends, start=1)
        ]
        # Every movement is over in a picture that comes before its number is said.
        for rep, tick in zip(ours, ends, strict=True):
            assert any(rep.end_s <= 0.1 * frame for frame in range(2 * tick, 2 * tick + 2))
        assert all(len(chunk.frames) == 2 for chunk in one.chunks)
    assert distracted


def test_results_come_in_and_are_told_when_the_user_is_quiet(
    bank: SpeechBank, layout: MicroTurnLayout
) -> None:
    overlapped = 0
    for one in some("delegate", bank, num=10):
        call, answer = one.script.expected
        [(arrives, result)] = one.script.results
        assert call.call is not None and call.call[1]["request"] in one.script.spoken[0].text
        assert one.chunks[arrives].items == (result,)
        assert answer.text == result.content and answer.tick > arrives
        if len(one.script.spoken) == 2:
            overlapped += 1
            assert answer.tick * TICK_SAMPLES >= heard_until(one, 1, bank)
        one.transcript(layout)  # raises for a result of a call that is not out yet
    assert overlapped


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_transcripts_pack_and_say_what_the_script_says(
    task: str, split: str, bank: SpeechBank, layout: MicroTurnLayout, config: ModelConfig
) -> None:
    one = interaction(2, 1, split, bank=bank, tasks=[task])  # type: ignore[arg-type]
    transcript = one.transcript(layout)
    batch = PackedBatch.pack([transcript, transcript], config)
    assert batch.num_sequences == 2 and batch.num_tokens == 2 * transcript.num_tokens
    is_labelled = transcript.targets != IGNORED_TARGET
    assert int((transcript.streams[is_labelled] == int(Stream.FORCED)).sum()) == 0
    # Played back through the live grammar, the targets begin the right thing in the right tick.
    begun, calls, was_speaking, state = {}, [], False, layout.initial_state()
    for chunk, run in zip(one.chunks, one.runs(layout), strict=True):
        output = layout.begin_output(layout.encode_input(chunk, state).state)
        events = [event for token in run for event in output.accept(token, 0.0)]
        text = "".join(event.text for event in events if isinstance(event, TextToken))
        calls += [(e.name, e.args) for e in events if isinstance(e, ToolCall)]
        is_speaking = output.state.is_in_call or bool(text)
        if is_speaking and not was_speaking:
            begun[state.tick] = text
        elif text:
            begun[max(begun)] += text
        # Numbers that come tick after tick are told apart by their space.
        was_speaking, state = is_speaking, output.state
    expected = one.script.expected
    assert {e.tick for e in expected} >= set(begun)
    assert " ".join(t.strip() for t in begun.values() if t) == " ".join(
        e.text for e in expected if e.text
    )
    assert calls == [e.call for e in expected if e.call]
    labels = transcript.targets[is_labelled]
    num_silent = int((labels == layout.grammar.tokens.silence).sum())
    assert num_silent >= len(one.chunks) - 20 - 3 * len(expected)
    assert torch.equal(transcript.targets, one.transcript(layout).targets)


def test_the_splits_share_neither_words_nor_values(bank: SpeechBank) -> None:
    for task in TASKS.values():
        assert not set(task.phrasings.train) & set(task.phrasings.held_out)
        if task.name not in ("chain", "background_speech"):  # which ask for nothing of their own
            assert len(task.phrasings.train) >= 10 and len(task.phrasings.held_out) >= 4
    for seconds in (TIMER_SECONDS, PERIOD_SECONDS):
        assert not set(seconds["train"]) & set(seconds["held_out"])
    assert not set(WORDS) & set(CUES) and min(len(WORDS), len(CUES)) >= 40
    known: dict[str, set[object]] = {split: set() for split in SPLITS}
    names = {split: {(one.engine, one.name) for one in voices(split)} for split in SPLITS}
    for split in SPLITS:
        for one in interactions(3, split, bank=bank, num=25):
            script = one.script
            assert script.phrasing == (script.requests[0][1] if script.requests else "")
            for part, phrasing in script.requests:
                assert phrasing in TASKS[part].phrasings.of(split)
            said_by = {(spoken.voice.engine, spoken.voice.name) for spoken in script.spoken}
            assert said_by <= names[split]
            known[split] |= set(script.requests) | said_by
            known[split] |= {rep.action for rep in (script.scene.reps if script.scene else ())}
    assert not known["train"] & known["held_out"]


def test_refusals(bank: SpeechBank, layout: MicroTurnLayout) -> None:
    with pytest.raises(errors.InvalidArgument, match="seed: expected 0 to"):
        interaction(-1, 0, bank=bank)
    with pytest.raises(errors.InvalidArgument, match="index: expected 0 to"):
        next(interactions(0, bank=bank, start=-1))
    with pytest.raises(errors.InvalidArgument, match=r"split: expected one of .*'test'"):
        interaction(0, 0, "test", bank=bank)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match=r"tasks: expected some of .*'dance'"):
        interaction(0, 0, bank=bank, tasks=["dance"])
    with pytest.raises(errors.InvalidArgument, match="tasks: expected at least one"):
        interaction(0, 0, bank=bank, tasks=[])
    with pytest.raises(errors.InvalidArgument, match=r"Phrasings: .*\['a'\] in both"):
        Phrasings(("a", "b"), ("a",))
    one = interaction(0, 0, bank=bank, tasks=["aside"])
    script = one.script

    def expecting(*expected: Expected) -> Script:
        return replace(script, expected=expected)

    with pytest.raises(errors.InvalidArgument, match="expected rising ticks, got"):
        expecting(Expected(3, "a"), Expected(3, "b"))
    with pytest.raises(errors.InvalidArgument, match=r"Script.expected: expected ticks in \[0, "):
        expecting(Expected(script.num_ticks, "late"))
    busy = Expected(3, "a long sentence indeed")
    late = Expected(14, "b")
    for first, then in (
        (busy, Expected(4, call=("look", {}))),
        (Expected(3, call=("look", {})), Expected(4, "b")),
        (replace(busy, text=8 * busy.text), late),
    ):
        crowded = Interaction(
            replace(expecting(), num_ticks=99, expected=(first, then)), one.chunks
        )
        with pytest.raises(
            errors.InvalidArgument, match=r"tick \d+ has output, but what came before"
        ):
            crowded.runs(layout)
    cut = Interaction(expecting(Expected(script.num_ticks - 1, "a long sentence")), one.chunks)
    with pytest.raises(errors.InvalidArgument, match=r"ends \d+ tokens before its output does"):
        cut.runs(layout)


def test_everybody_is_as_loud(bank: SpeechBank) -> None:
    for split in SPLITS:
        for ours in bank.voices(split):
            for level in (1.0, 0.25):
                heard = perform(Spoken(0, "good morning", ours[0], 1.05, level), bank).pcm
                assert np.sqrt(np.mean(heard**2)) == pytest.approx(0.1 * level, rel=0.02)


def test_the_stream_goes_to_shards_one_by_one(
    bank: SpeechBank, layout: MicroTurnLayout, config: ModelConfig, tmp_path: Path
) -> None:
    made = interactions(4, bank=bank, num=3)
    assert write_shards((one.transcript(layout) for one in made), tmp_path / "d", config) == 3
    reader = ShardReader(tmp_path / "d", config)
    for one, kept in zip(interactions(4, bank=bank, num=3), reader, strict=True):
        transcript = one.transcript(layout)
        assert torch.equal(kept.targets, transcript.targets)
        assert torch.equal(kept.streams, transcript.streams)
