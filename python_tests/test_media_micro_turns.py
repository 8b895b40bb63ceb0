"""Micro-turns: the 200 ms clock over files, arrays and live feeds; laziness; ends; refusals."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tml_core.errors import InvalidArgument, InvalidType, MediaError
from tml_core.media import MicroTurn, VideoReader, clips, fit_frame, micro_turns, read_audio

RATE = 16000


def _noise(num_samples: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.uniform(-0.9, 0.9, num_samples).astype(np.float32)


def _sound(turns: list[MicroTurn]) -> np.ndarray:
    parts = [t.audio[: len(t.audio) - t.num_padded] for t in turns if t.audio is not None]
    return np.concatenate(parts)


def _pictures(count: int, height: int = 30, width: int = 40) -> list[np.ndarray]:
    return [np.full((height, width, 3), i, np.uint8) for i in range(count)]


def test_micro_turns_of_the_bundled_clips():
    turns = list(micro_turns(*clips()))
    assert [turn.index for turn in turns] == list(range(80))
    assert [turn.start_ms for turn in turns] == list(range(0, 16000, 200))
    assert all(turn.audio.shape == (3200,) and turn.num_padded == 0 for turn in turns)
    assert np.array_equal(_sound(turns), read_audio(clips().audio))
    frames = [frame for turn in turns for frame in turn.frames]
    with VideoReader(clips().video) as reader:
        grid = [rgb for _, rgb in reader.frames_on_grid(10)]
    assert len(frames) == len(grid) == 160
    assert all(np.array_equal(a, b) for a, b in zip(frames, grid, strict=True))
    assert all(turn.text is None for turn in turns)


def test_micro_turns_with_one_frame_a_tick_take_the_first_of_two():
    two = list(micro_turns(video=clips().video, duration_s=1.0))
    one = list(micro_turns(video=clips().video, duration_s=1.0, fps=5))
    assert [len(turn.frames) for turn in two] == [2] * 5
    assert [len(turn.frames) for turn in one] == [1] * 5
    for a, b in zip(two, one, strict=True):
        assert np.array_equal(a.frames[0], b.frames[0])


@pytest.mark.parametrize("num_samples", [1, 3199, 3200, 3201, 9600, 10000])
def test_micro_turns_pad_the_last_tick_and_say_so(num_samples):
    pcm_S = _noise(num_samples)
    turns = list(micro_turns(pcm_S, sample_rate=RATE))
    assert len(turns) == -(-num_samples // 3200)
    assert all(turn.audio.shape == (3200,) for turn in turns)
    assert [turn.num_padded for turn in turns] == [0] * (len(turns) - 1) + [-num_samples % 3200]
    assert not turns[-1].audio[3200 - turns[-1].num_padded :].any()
    assert np.array_equal(_sound(turns), pcm_S)
    bare = list(micro_turns(pcm_S, sample_rate=RATE, pad=False))
    assert [turn.num_padded for turn in bare] == [0] * len(turns)
    assert np.array_equal(np.concatenate([turn.audio for turn in bare]), pcm_S)


def test_micro_turns_of_nothing():
    assert list(micro_turns(np.zeros(0, np.float32), sample_rate=RATE)) == []
    assert list(micro_turns(iter(()), iter(()), sample_rate=RATE)) == []


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 10000), max_size=10))
def test_micro_turns_do_not_depend_on_how_a_feed_is_cut(cuts):
    pcm_S = _noise(10000)
    edges = [0, *sorted(cuts), 10000]
    pieces = (pcm_S[a:b] for a, b in pairwise(edges))
    turns = list(micro_turns(pieces, sample_rate=RATE))
    assert [turn.num_padded for turn in turns] == [0, 0, 0, 2800]
    assert np.array_equal(_sound(turns), pcm_S)


def test_micro_turns_give_a_tick_before_they_ask_for_more():
    asked: list[int] = []

    def microphone():
        for i in range(5):
            asked.append(i)
            yield _noise(1600)

    def camera():
        for i, picture in enumerate(_pictures(10)):
            asked.append(100 + i)
            yield picture

    turns = micro_turns(microphone(), camera(), sample_rate=RATE)
    assert asked == []
    assert next(turns).frames[1][0, 0, 0] == 1
    assert asked == [0, 1, 100, 101]
    next(turns)
    assert asked == [0, 1, 100, 101, 2, 3, 102, 103]


def test_micro_turns_copy_a_feed_that_reuses_its_buffers():
    samples_S = np.zeros(2000, np.float32)
    picture = np.zeros((4, 4, 3), np.uint8)

    def microphone():
        for i in range(8):
            samples_S[:] = i / 8
            yield samples_S

    def camera():
        for i in range(10):
            picture[:] = i
            yield picture

    turns = list(micro_turns(microphone(), camera(), sample_rate=RATE))
    assert np.array_equal(_sound(turns), np.repeat(np.arange(8) / 8, 2000).astype(np.float32))
    assert [int(f[0, 0, 0]) for turn in turns for f in turn.frames] == list(range(10))


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_micro_turns_resample_what_says_its_rate(rate):
    pcm_S = _noise(rate)
    want_S = np.clip(soxr.resample(pcm_S, rate, RATE), -1.0, 1.0)
    pieces = [pcm_S[i : i + 777] for i in range(0, rate, 777)]
    for audio in (pcm_S, torch.from_numpy(pcm_S), pieces, iter(pieces)):
        assert np.array_equal(_sound(list(micro_turns(audio, sample_rate=rate))), want_S)


def test_micro_turns_resample_files(tmp_path):
    soundfile.write(tmp_path / "a.wav", _noise(3 * 44100), 44100, subtype="FLOAT")
    turns = list(micro_turns(tmp_path / "a.wav"))
    assert len(turns) == 15
    assert np.array_equal(_sound(turns), read_audio(tmp_path / "a.wav"))


def test_micro_turns_go_on_until_the_longer_source_ends():
    sound, pictures = _noise(5000), _pictures(7)
    turns = list(micro_turns(sound, pictures, sample_rate=RATE))
    assert [turn.audio is not None for turn in turns] == [True, True, False, False]
    assert [len(turn.frames) for turn in turns] == [2, 2, 2, 1]
    turns = list(micro_turns(_noise(9600), pictures[:1], sample_rate=RATE))
    assert [len(turn.frames) for turn in turns] == [1, 0, 0]


def test_micro_turns_of_a_camera_that_misses_a_frame():
    pictures = [*_pictures(2), None, *_pictures(1), None, None]
    turns = list(micro_turns(video=pictures))
    assert [len(turn.frames) for turn in turns] == [2, 1, 0]


def test_micro_turns_fit_live_pictures():
    pictures = [np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)]
    (turn,) = micro_turns(video=pictures)
    assert np.array_equal(turn.frames[0], fit_frame(pictures[0], 159))
    (turn,) = micro_turns(video=pictures, max_edge=None)
    assert np.array_equal(turn.frames[0], pictures[0])


@pytest.mark.parametrize(
    ("duration_s", "num_turns"), [(0.2, 1), (0.6, 3), (0.61, 4), (1e-3, 1), (99, 50)]
)
def test_micro_turns_stop_at_a_duration(duration_s, num_turns):
    pcm_S = _noise(10 * RATE)
    turns = list(micro_turns(pcm_S, sample_rate=RATE, duration_s=duration_s))
    assert len(turns) == num_turns
    assert np.array_equal(_sound(turns), pcm_S[: num_turns * 3200])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InvalidArgument, "micro_turns: expected audio, video or both, got neither"),
        ({"audio": _noise(9)}, InvalidArgument, "sample_rate: expected the rate.*got None"),
        ({"audio": iter(())}, InvalidArgument, "sample_rate: expected the rate.*got None"),
        ({"audio": clips().audio, "sample_rate": 8000}, InvalidArgument, "sample_rate: .*a file"),
        ({"video": [], "sample_rate": 8000}, InvalidArgument, "sample_rate: .*without audio"),
        ({"audio": _noise(9), "sample_rate": 0}, InvalidArgument, "sample_rate: .*at least 1"),
        ({"audio": _noise(9) * 2, "sample_rate": RATE}, InvalidArgument, r"audio: .*\[-1, 1\]"),
        ({"audio": 3, "sample_rate": RATE}, InvalidType, "audio: expected a path.*got int"),
        ({"audio": "gone.wav"}, MediaError, "'gone.wav': no such file"),
        ({"video": "gone.mp4"}, MediaError, "'gone.mp4': no such file"),
        ({"video": _pictures(1)[0]}, InvalidType, "video: expected a path or.*got ndarray"),
        ({"video": [], "fps": 30}, InvalidArgument, "fps: expected 5 or 10.*got 30"),
        ({"video": [], "max_edge": 0}, InvalidArgument, "max_edge: expected at least 1, got 0"),
        ({"video": [], "duration_s": 0}, InvalidArgument, "duration_s: expected a positive"),
        ({"video": [], "duration_s": "1"}, InvalidType, "duration_s: expected a number, got str"),
    ],
)
def test_micro_turns_refuse_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        micro_turns(**arguments)


def test_micro_turns_refuse_a_bad_piece_when_it_comes():
    turns = micro_turns([_noise(3200), np.full(5, np.nan, np.float32)], sample_rate=RATE)
    assert next(turns).index == 0
    with pytest.raises(InvalidArgument, match=r"audio\[1\]: expected finite samples"):
        next(turns)
    turns = micro_turns(video=[*_pictures(2), np.zeros((4, 4), np.uint8)])
    next(turns)
    with pytest.raises(InvalidArgument, match=r"video\[2\]: expected a uint8 array"):
        next(turns)


def test_micro_turns_close_their_files_when_left_early():
    turns = micro_turns(*clips())
    next(turns)
    turns.close()
    assert next(turns, None) is None


def test_micro_turn_by_hand():
    turn = MicroTurn(audio=_noise(3200), text="hello", index=3)
    assert (turn.start_ms, turn.frames, turn.num_padded) == (600, (), 0)
    assert replace(turn, text=None).text is None
    assert MicroTurn(frames=_pictures(2)).frames[1][0, 0, 0] == 1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"audio": _noise(3201)}, InvalidArgument, "MicroTurn.audio: expected at most 3200"),
        ({"audio": _noise(9).astype(float)}, InvalidArgument, "MicroTurn.audio: .*float64"),
        ({"frames": _pictures(3)}, InvalidArgument, "MicroTurn.frames: expected at most 2, got 3"),
        ({"frames": _pictures(1)[0]}, InvalidType, "MicroTurn.frames: .*got ndarray"),
        (
            {"frames": (*_pictures(1), *_pictures(1, height=5))},
            InvalidArgument,
            r"MicroTurn.frames: expected one shape, got \[30, 40, 3\] and \[5, 40, 3\]",
        ),
        ({"frames": (np.zeros(3),)}, InvalidArgument, r"MicroTurn.frames\[0\]: .*float64"),
        ({"text": b"hello"}, InvalidType, "MicroTurn.text: expected str, got bytes"),
        ({"index": -1}, InvalidArgument, "MicroTurn.index: expected at least 0, got -1"),
        ({"index": 1.0}, InvalidType, "MicroTurn.index: expected an int, got float"),
        ({"index": 2, "start_ms": 200}, InvalidArgument, "MicroTurn.start_ms: .*400, got 200"),
        ({"num_padded": 1}, InvalidArgument, "MicroTurn.num_padded: expected 0 to 0, got 1"),
    ],
)
def test_micro_turn_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        MicroTurn(**fields)
