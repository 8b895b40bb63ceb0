"""Rooms, noise and pictures: seeded, in bounds, and nothing moves in time."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.random import Generator, Philox

from tml_core.data.augment import Sound, apply_sound, draw_sound
from tml_core.data.figure import (
    ACTIONS,
    FRAME_EDGE,
    HELD_OUT_ACTIONS,
    Rep,
    Scene,
    draw_scene,
    render,
)

DRY = Sound(gain_db=0.0, snr_db=300.0, slope=0.0, rt60_s=0.0, echo_db=-6.0, seed=4)


def rng(seed: int) -> Generator:
    return Generator(Philox(key=seed))


def click(length: int = 3200, at: int = 1000) -> np.ndarray:
    pcm = np.zeros(length, np.float32)
    pcm[at] = 0.5
    return pcm


def changed(**fields: float | None) -> Sound:
    return Sound(**{**vars(DRY), **fields})  # type: ignore[arg-type]


def test_sound_is_its_settings() -> None:
    pcm = (0.3 * rng(1).standard_normal(5000)).clip(-1, 1).astype(np.float32)
    drawn = [draw_sound(rng(seed)) for seed in range(30)]
    assert drawn == [draw_sound(rng(seed)) for seed in range(30)]
    assert 5 < sum(one.rt60_s == 0.0 for one in drawn) < 18
    for one in drawn:
        heard = apply_sound(pcm, one)
        assert heard.dtype == np.float32 and heard.shape == pcm.shape
        assert np.abs(heard).max() <= 1.0
        assert np.array_equal(heard, apply_sound(pcm, one))
    assert not np.array_equal(
        apply_sound(pcm, changed(snr_db=20.0)), apply_sound(pcm, changed(snr_db=20.0, seed=5))
    )


def test_gain_and_noise_are_as_loud_as_asked() -> None:
    quiet = apply_sound(click(), changed(gain_db=-20.0))
    np.testing.assert_allclose(quiet, 0.1 * click(), atol=1e-9)
    tone = np.sin(np.arange(32000) * 0.3).astype(np.float32) * np.float32(0.2)
    for slope in (0.0, 1.0, 2.0):
        noise = apply_sound(tone, changed(snr_db=20.0, slope=slope)) - tone
        ratio = 20 * np.log10(np.sqrt(np.mean(tone**2)) / np.sqrt(np.mean(noise**2)))
        assert abs(ratio - 20.0) < 0.2
    assert apply_sound(np.zeros(3200, np.float32), changed(snr_db=30.0)).any()


def test_a_room_adds_echoes_after_the_sound() -> None:
    wet = apply_sound(click(16000), changed(rt60_s=0.3))
    np.testing.assert_allclose(wet[:1000], 0.0, atol=1e-6)  # of a float32 transform
    assert wet[1000] == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_allclose(wet[1001:1032], 0.0, atol=1e-6)
    tail = wet[1032:].astype(np.float64)
    assert 10 * np.log10(np.sum(tail**2) / 0.25) == pytest.approx(-6.0, abs=0.05)
    early, late = (np.sum(tail[start : start + 800] ** 2) for start in (0, 2400))
    # 150 ms later, half of rt60: 30 dB down.
    assert 10 * np.log10(early / late) == pytest.approx(30.0, abs=3.0)


@pytest.mark.parametrize("action", [*ACTIONS, *HELD_OUT_ACTIONS])
def test_a_repetition_goes_out_and_comes_back(action: str) -> None:
    scene = draw_scene(rng(2), (Rep(action, 1.0, 2.0), Rep(action, 2.5, 3.5)))
    scene = replace(scene, grain=0.0, shake=0.0, bystander=0.0)
    rest = render(scene, 0.0)
    assert rest.shape == (FRAME_EDGE, FRAME_EDGE, 3) and rest.dtype == np.uint8
    for at_rest in (1.0, 2.0, 2.2, 2.5, 3.5, 9.0):
        assert np.array_equal(render(scene, at_rest), rest)
    far = render(scene, 1.25)  # of some, the middle is between two movements
    assert np.array_equal(render(scene, 2.75), far)
    moved = [int((render(scene, t) != rest).any(axis=2).sum()) for t in (1.1, 1.25)]
    assert moved[1] > 20 and moved[0] > 0
    # The figure is in the picture, and can be told from the wall.
    assert 100 < int((np.abs(rest.astype(int) - scene.body) < 3).all(axis=2).sum()) < 1500


def test_looks_differ_and_are_seeded() -> None:
    scenes = [draw_scene(rng(seed), ()) for seed in range(20)]
    assert len({render(scene, 0.0).tobytes() for scene in scenes}) == 20
    assert {scene.is_mirrored for scene in scenes} == {True, False}
    for scene in scenes:
        assert np.array_equal(render(scene, 0.3), render(scene, 0.3))
        assert max(abs(a - b) for a, b in zip(scene.body, scene.wall, strict=True)) > 60
    grainy = replace(scenes[0], grain=5.0)
    assert not np.array_equal(render(grainy, 0.0), render(grainy, 0.1))


def test_actions_are_told_apart() -> None:
    assert not set(ACTIONS) & set(HELD_OUT_ACTIONS)
    far = {
        render(draw_scene(rng(3), (Rep(action, 0.0, 1.0),)), 0.3).tobytes()
        for action in (*ACTIONS, *HELD_OUT_ACTIONS)
    }
    assert len(far) == len(ACTIONS) + len(HELD_OUT_ACTIONS)


def still(**fields: object) -> Scene:
    scene = replace(draw_scene(rng(6), ()), grain=0.0, shake=0.0, bystander=0.0)
    return replace(scene, **fields)  # type: ignore[arg-type]


def test_somebody_walks_in_and_out() -> None:
    empty, there = still(visits=((90.0, 95.0),)), still()
    scene = still(visits=((1.0, 5.0), (7.0, 10.0)))
    room = render(empty, 0.0)
    for time_s in (0.0, 1.0, 5.0, 6.0, 10.5):
        assert np.array_equal(render(scene, time_s), room)
    for time_s in (2.0, 3.3, 4.0, 8.5):
        assert np.array_equal(render(scene, time_s), render(there, 0.0))
    seen = [int((render(scene, t) != room).any(axis=2).sum()) for t in (1.3, 1.6, 2.0)]
    assert seen[0] < seen[1] <= seen[2] * 1.1 and seen[1] > 0.5 * seen[2]


def test_a_bystander_moves_alone() -> None:
    scene = still(bystander=0.4, reps=(Rep("squats", 0.0, 1.0, is_other=True),))
    moved = (render(scene, 0.5) != render(scene, 1.0)).any(axis=(0, 2))
    columns = moved[::-1] if scene.is_mirrored else moved
    assert columns[FRAME_EDGE * 7 // 10 :].any() and not columns[: FRAME_EDGE * 6 // 10].any()


def test_a_warped_repetition_keeps_its_ends_and_a_shaken_camera_its_picture() -> None:
    even, fast = (still(reps=(Rep("squats", 0.0, 1.0, warp),)) for warp in (0.0, 0.6))
    for time_s in (0.0, 1.0):
        assert np.array_equal(render(fast, time_s), render(even, time_s))
    assert not np.array_equal(render(fast, 0.25), render(even, 0.25))
    shaken = still(shake=2.0)
    pictures = [render(shaken, 0.1 * step) for step in range(10)]
    assert len({one.tobytes() for one in pictures}) > 3
    colors = [np.unique(one.reshape(-1, 3), axis=0).tolist() for one in pictures]
    assert all(shaken.wall in map(tuple, one) for one in colors)


def test_music_is_as_loud_as_asked_and_seeded() -> None:
    tone = np.sin(np.arange(48000) * 0.3).astype(np.float32) * np.float32(0.2)
    music = apply_sound(tone, changed(music_db=-20.0)) - tone
    ratio = 20 * np.log10(np.sqrt(np.mean(tone**2)) / np.sqrt(np.mean(music**2)))
    assert abs(ratio - 20.0) < 1.5  # a bar of it is longer than this
    assert np.array_equal(music, apply_sound(tone, changed(music_db=-20.0)) - tone)
    drawn = [draw_sound(rng(seed)).music_db for seed in range(60)]
    assert 2 < sum(one is not None for one in drawn) < 20
