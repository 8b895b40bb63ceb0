"""What happens to sound on its way to a microphone: a room, noise, gain. Nothing moves in time.

Legend: S samples, R samples of a room's response.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox

from tml_core.media._checks import Pcm
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["Sound", "apply_sound", "draw_sound"]


@dataclass(frozen=True)
class Sound:
    """``gain_db``: of everything. ``snr_db``: speech over noise. ``slope``: of the noise's power
    over frequency, 0 white, 1 pink, 2 brown. ``rt60_s``: until an echo is 60 dB down, 0 for no
    room. ``echo_db``: the echoes against the direct sound. ``seed``: of the noise and the room."""

    gain_db: float
    snr_db: float
    slope: float
    rt60_s: float
    echo_db: float
    seed: int


def draw_sound(rng: Generator) -> Sound:
    """Everyday conditions, a third of them without a room."""
    is_in_room = rng.random() < 2 / 3
    return Sound(
        gain_db=round(float(rng.uniform(-15.0, 0.0)), 2),
        snr_db=round(float(rng.uniform(10.0, 45.0)), 2),
        slope=round(float(rng.uniform(0.0, 2.0)), 2),
        rt60_s=round(float(rng.uniform(0.1, 0.6)), 3) if is_in_room else 0.0,
        echo_db=round(float(rng.uniform(-20.0, -6.0)), 2),
        seed=int(rng.integers(1 << 62)),
    )


def apply_sound(pcm_S: Pcm, sound: Sound) -> Pcm:
    """The same samples as a microphone would have them: float32 [S] in [-1, 1]."""
    rng = Generator(Philox(key=sound.seed))
    heard_S = pcm_S.astype(np.float64)
    level = float(np.sqrt(np.mean(np.square(heard_S[heard_S != 0])))) if pcm_S.any() else 0.05
    if sound.rt60_s:
        heard_S = _in_room(heard_S, sound, rng)
    noise_S = _noise(len(heard_S), sound.slope, rng)
    heard_S = heard_S + noise_S * level * 10.0 ** (-sound.snr_db / 20.0)
    heard_S *= 10.0 ** (sound.gain_db / 20.0)
    loudest = float(np.abs(heard_S).max(initial=0.0))
    if loudest > 1.0:
        heard_S /= loudest
    return np.asarray(heard_S, np.float32)


def _in_room(dry_S: np.ndarray, sound: Sound, rng: Generator) -> np.ndarray:
    """Direct sound first, then an exponentially decaying tail of noise (Moorer's model)."""
    num_echoes = round(sound.rt60_s * SAMPLE_RATE)
    time_R = np.arange(num_echoes) / SAMPLE_RATE
    tail_R = rng.standard_normal(num_echoes) * 10.0 ** (-3.0 * time_R / sound.rt60_s)
    tail_R[: SAMPLE_RATE // 500] = 0.0  # the first wall is 2 ms away
    tail_R *= 10.0 ** (sound.echo_db / 20.0) / np.sqrt(np.sum(np.square(tail_R)))
    tail_R[0] = 1.0
    size = 1 << (len(dry_S) + num_echoes).bit_length()
    wet_S = np.fft.irfft(np.fft.rfft(dry_S, size) * np.fft.rfft(tail_R, size), size)
    return np.asarray(wet_S[: len(dry_S)])


def _noise(length: int, slope: float, rng: Generator) -> np.ndarray:
    """Unit power, its spectrum falling as frequency to the minus ``slope``."""
    size = max(2, 1 << (length - 1).bit_length())
    spectrum = np.fft.rfft(rng.standard_normal(size))
    hz = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20.0)
    noise = np.fft.irfft(spectrum * hz ** (-slope / 2.0), size)[:length]
    return np.asarray(noise / np.sqrt(np.mean(np.square(noise))))
