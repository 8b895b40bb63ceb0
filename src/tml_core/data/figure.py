"""A stick figure that does exercises: pictures whose counts and times are known by construction.

Legend: H height, W width. Lengths are in heights of the picture, angles in degrees from hanging
straight down, outwards positive.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.random import Generator, Philox

from tml_core.media._checks import Rgb

__all__ = [
    "ACTIONS",
    "FRAME_EDGE",
    "HELD_OUT_ACTIONS",
    "WALK_S",
    "Rep",
    "Scene",
    "draw_scene",
    "render",
]

FRAME_EDGE: Final = 72  # two patches each way: four a tick
WALK_S: Final = 1.0  # from outside the picture to one's place
_OUTSIDE: Final = 0.9

Color = tuple[int, int, int]


@dataclass(frozen=True)
class _Pose:
    """Left and right: upper arm, forearm against it, thigh, shin against it; the body's lean; how
    far the feet are above the floor, in heights of the picture."""

    arms: tuple[float, float] = (12.0, 12.0)
    elbows: tuple[float, float] = (0.0, 0.0)
    thighs: tuple[float, float] = (6.0, 6.0)
    knees: tuple[float, float] = (0.0, 0.0)
    lean: float = 0.0
    rise: float = 0.0

    def values(self) -> np.ndarray:
        return np.array([*self.arms, *self.elbows, *self.thighs, *self.knees, self.lean, self.rise])


_REST: Final = _Pose()
# What a repetition goes to, one after the other, and comes back from.
_WAY: Final = {
    "jumping jacks": (_Pose(arms=(165, 165), thighs=(30, 30)),),
    "squats": (_Pose(arms=(85, 85), thighs=(70, 70), knees=(-80, -80)),),
    "arm raises": (_Pose(arms=(160, 160)),),
    "side bends": (_Pose(arms=(25, 120), lean=38),),
    "knee raises": (_Pose(thighs=(6, 95), knees=(0, -95)),),
    "punches": (_Pose(arms=(88, 12)), _Pose(arms=(12, 88))),
    "hops": (_Pose(arms=(35, 35), rise=0.14),),
    "marches": (
        _Pose(thighs=(70, 6), knees=(-70, 0), arms=(12, 50)),
        _Pose(thighs=(6, 70), knees=(0, -70), arms=(50, 12)),
    ),
    "waves": (_Pose(arms=(12, 95), elbows=(0, 85)),),
    "side kicks": (_Pose(arms=(40, 40), thighs=(6, 85)),),
    "windmills": (_Pose(arms=(170, 12)), _Pose(arms=(12, 170))),
    "arm crosses": (_Pose(arms=(-45, -45), elbows=(-40, -40)),),
}
HELD_OUT_ACTIONS: Final = ("waves", "side kicks", "windmills", "arm crosses")
ACTIONS: Final = tuple(name for name in _WAY if name not in HELD_OUT_ACTIONS)


@dataclass(frozen=True)
class Rep:
    """One repetition of ``action``: at rest at both its times. ``warp``: -0.6 to 0.6, how much
    faster the first half goes than the second. ``is_other``: it is the bystander who does it."""

    action: str
    start_s: float
    end_s: float
    warp: float = 0.0
    is_other: bool = False


@dataclass(frozen=True)
class Scene:
    """A figure in front of a wall, from time 0. ``scale``: its size, ``offset``: of its feet from
    the middle of the floor. ``reps`` in order of time, none beside another of the same person.
    ``visits``: when the figure is there, walking in and out within `WALK_S`; always if empty.
    ``shake``: of the camera, in pixels. ``bystander``: where a smaller second figure stands, 0 for
    none."""

    reps: tuple[Rep, ...]
    visits: tuple[tuple[float, float], ...]
    body: Color
    wall: Color
    floor: Color
    scale: float
    offset: float
    thickness: float
    grain: float
    shake: float
    bystander: float
    is_mirrored: bool
    seed: int


def draw_scene(
    rng: Generator, reps: tuple[Rep, ...], visits: tuple[tuple[float, float], ...] = ()
) -> Scene:
    """A look for these movements; the figure always stands out from the wall."""
    wall = rng.integers(30, 226, 3)
    body = np.where(wall > 127, rng.integers(0, 60, 3), rng.integers(196, 256, 3))
    floor = np.clip(wall + rng.integers(-30, 31, 3), 0, 255)
    has_other = any(rep.is_other for rep in reps) or rng.random() < 0.15
    return Scene(
        reps=reps,
        visits=visits,
        body=_color(body),
        wall=_color(wall),
        floor=_color(floor),
        scale=round(float(rng.uniform(0.75, 1.0)), 3),
        offset=round(float(rng.uniform(-0.1, 0.1)), 3),
        thickness=round(float(rng.uniform(0.016, 0.032)), 4),
        grain=round(float(rng.uniform(0.0, 8.0)), 2),
        shake=round(float(rng.uniform(0.5, 2.5)), 2) if rng.random() < 0.3 else 0.0,
        bystander=round(float(rng.choice([-1, 1]) * rng.uniform(0.36, 0.42)), 3)
        if has_other
        else 0.0,
        is_mirrored=bool(rng.random() < 0.5),
        seed=int(rng.integers(1 << 62)),
    )


def render(scene: Scene, time_s: float) -> Rgb:
    """What a camera sees at that time: uint8 [72, 72, 3]."""
    edge = FRAME_EDGE
    image = np.empty((edge, edge, 3), np.float32)
    image[:] = scene.wall
    image[round(0.88 * edge) :] = scene.floor
    body = np.array(scene.body, np.float32)
    if scene.bystander:
        other = replace(scene, scale=0.45, offset=scene.bystander)
        cover_HW1 = _cover(tuple(_limbs(other, time_s, is_other=True)))[..., None]
        image += cover_HW1 * (0.6 * body + 0.4 * np.array(scene.wall, np.float32) - image)
    away = _away(scene, time_s)
    if away < _OUTSIDE:
        here = replace(scene, offset=scene.offset + away) if away else scene
        cover_HW1 = _cover(tuple(_limbs(here, time_s)))[..., None]
        image += cover_HW1 * (body - image)
    if scene.shake:
        phases = 2.0 * np.pi * (time_s * np.array([1.3, 1.7]) + np.array([0.0, scene.seed % 97]))
        down, right = np.rint(scene.shake * np.sin(phases)).astype(int)
        inside = np.arange(edge)
        image = image[np.clip(inside + down, 0, edge - 1)][:, np.clip(inside + right, 0, edge - 1)]
    if scene.grain:
        rng = Generator(Philox(key=[scene.seed, round(time_s * 1000)]))
        image += scene.grain * rng.standard_normal((edge, edge, 1), np.float32)
    if scene.is_mirrored:
        image = image[:, ::-1]
    return np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))


def _away(scene: Scene, time_s: float) -> float:
    """How far the figure is from its place, in widths of the picture."""
    if not scene.visits:
        return 0.0
    away = _OUTSIDE
    for start_s, end_s in scene.visits:
        walked = min(time_s - start_s, end_s - time_s) / WALK_S
        if walked > 0.0:
            away = min(away, _OUTSIDE * (1.0 - min(1.0, walked)))
    return away


Point = tuple[float, float]
Limb = tuple[Point, Point, float]


@lru_cache(maxsize=8)
def _cover(limbs: tuple[Limb, ...]) -> np.ndarray:
    """How much of each pixel the limbs take: float32 [H, W]; a figure at rest is drawn once."""
    edge = FRAME_EDGE
    axis = (np.arange(edge, dtype=np.float32) + 0.5) / edge
    x0, y0, x1, y1, width = np.array([(*a, *b, half) for a, b, half in limbs], np.float32).T[
        :, :, None
    ]
    dx, dy = x1 - x0, y1 - y0
    scale = 1.0 / np.maximum(dx * dx + dy * dy, np.float32(1e-9))
    x_LW, y_LH = axis - x0, axis - y0
    along_LHW = (y_LH * dy * scale)[:, :, None] + (x_LW * dx * scale)[:, None, :]
    np.clip(along_LHW, 0.0, 1.0, out=along_LHW)
    apart_LHW = np.square(x_LW[:, None, :] - along_LHW * dx[..., None])
    apart_LHW += np.square(y_LH[:, :, None] - along_LHW * dy[..., None])
    np.sqrt(apart_LHW, out=apart_LHW)
    apart_LHW -= width[..., None]
    cover_HW: np.ndarray = np.clip(0.5 - apart_LHW.min(axis=0) * edge, 0.0, 1.0)
    cover_HW.flags.writeable = False
    return cover_HW


def _limbs(scene: Scene, time_s: float, *, is_other: bool = False) -> list[Limb]:
    """Segments and their half widths, in the picture."""
    pose = _pose(scene, time_s, is_other)
    arms, elbows, thighs, knees = pose[0:2], pose[2:4], pose[4:6], pose[6:8]
    lean, rise = float(pose[8]), float(pose[9])
    limbs: list[Limb] = []
    width = scene.thickness
    neck = _step((0.0, 0.0), 180.0 - lean, 0.28)
    head = _step(neck, 180.0 - lean, 0.09)
    limbs += [((0.0, 0.0), neck, width * 1.3), (head, head, 0.055)]
    feet = []
    for side, arm, elbow, thigh, knee in zip((-1, 1), arms, elbows, thighs, knees, strict=True):
        hand_angle = arm + elbow
        elbow_at = _step(neck, side * arm, 0.15)
        limbs.append((neck, elbow_at, width))
        limbs.append((elbow_at, _step(elbow_at, side * hand_angle, 0.14), width))
        knee_at = _step((0.0, 0.0), side * thigh, 0.2)
        foot = _step(knee_at, side * (thigh + knee), 0.2)
        limbs += [((0.0, 0.0), knee_at, width), (knee_at, foot, width)]
        feet.append(foot[1])
    down = max(feet)  # the lower foot stands on the floor

    def place(point: Point) -> Point:
        x, y = point
        return 0.5 + scene.offset + scene.scale * x, 0.92 + scene.scale * (y - down - rise)

    return [(place(a), place(b), scene.scale * half) for a, b, half in limbs]


def _pose(scene: Scene, time_s: float, is_other: bool) -> np.ndarray:
    rest = _REST.values()
    for rep in scene.reps:
        if rep.start_s <= time_s < rep.end_s and rep.is_other == is_other:
            phase = (time_s - rep.start_s) / (rep.end_s - rep.start_s)
            phase += rep.warp * float(np.sin(2.0 * np.pi * phase)) / (2.0 * np.pi)
            way = _WAY[rep.action]
            leg = min(int(phase * len(way)), len(way) - 1)
            far = 0.5 - 0.5 * float(np.cos(2.0 * np.pi * (phase * len(way) - leg)))
            rest += (way[leg].values() - rest) * far
    return rest


def _step(start: Point, angle: float, length: float) -> Point:
    radians = np.deg2rad(angle)
    return (
        start[0] + length * float(np.sin(radians)),
        start[1] + length * float(np.cos(radians)),
    )


def _color(values: np.ndarray) -> Color:
    red, green, blue = (int(value) for value in values)
    return red, green, blue
