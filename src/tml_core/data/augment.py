"""What happens to sound on its way to a microphone: a room, noise, gain. Nothing moves in time.

Legend: S samples, R samples of a room's response.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.random import Generator, Philox

from tml_core.media._checks import Pcm
from tml_core.media.audio_file import SAMPLE_RATE

__all__ = ["Sound", "apply_sound", "draw_sound"]

_FFT_SIZE: Final = 1 << 15  # of blocks; longer than twice any tail


@dataclass(frozen=True)
class Sound:
    """``gain_db``: of everything. ``snr_db``: speech over noise. ``slope``: of the noise's power
    over frequency, 0 white, 1 pink, 2 brown. ``music_db``: music under the speech, None for none.
    ``rt60_s``: until an echo is 60 dB down, 0 for no
    room. ``echo_db``: the echoes against the direct sound. ``seed``: of the noise and the room."""

    gain_db: float
    snr_db: float
    slope: float
    rt60_s: float
    echo_db: float
    seed: int
    music_db: float | None = None


def draw_sound(rng: Generator) -> Sound:
    """Everyday conditions, a third of them without a room, one in seven with music."""
    is_in_room = rng.random() < 2 / 3
    return Sound(
        gain_db=round(float(rng.uniform(-15.0, 0.0)), 2),
        snr_db=round(float(rng.uniform(10.0, 45.0)), 2),
        slope=round(float(rng.uniform(0.0, 2.0)), 2),
        rt60_s=round(float(rng.uniform(0.1, 0.6)), 3) if is_in_room else 0.0,
        echo_db=round(float(rng.uniform(-20.0, -6.0)), 2),
        seed=int(rng.integers(1 << 62)),
        music_db=round(float(rng.uniform(-30.0, -10.0)), 2) if rng.random() < 0.15 else None,
    )


def apply_sound(pcm_S: Pcm, sound: Sound) -> Pcm:
    """The same samples as a microphone would have them: float32 [S] in [-1, 1]."""
    rng = Generator(Philox(key=sound.seed))
    heard_S = np.array(pcm_S, np.float32)
    spoken = heard_S[heard_S != 0]
    level = float(np.sqrt(np.mean(np.square(spoken)))) if len(spoken) else 0.05
    if sound.rt60_s:
        heard_S += _echoes(heard_S, sound, rng)
    noise_S = _noise(len(heard_S), sound.slope, rng)
    heard_S += noise_S * np.float32(level * 10.0 ** (-sound.snr_db / 20.0))
    if sound.music_db is not None:
        heard_S += _music(len(heard_S), rng) * np.float32(level * 10.0 ** (sound.music_db / 20.0))
    heard_S *= np.float32(10.0 ** (sound.gain_db / 20.0))
    loudest = float(np.abs(heard_S).max(initial=0.0))
    if loudest > 1.0:
        heard_S /= loudest
    return heard_S


def _echoes(dry_S: Pcm, sound: Sound, rng: Generator) -> Pcm:
    """What comes after the direct sound: an exponentially decaying tail of noise (Moorer's model).

    Convolved block by block, overlapping by the tail.
    """
    num_echoes = round(sound.rt60_s * SAMPLE_RATE)
    time_R = np.arange(num_echoes) / SAMPLE_RATE
    tail_R = rng.standard_normal(num_echoes) * 10.0 ** (-3.0 * time_R / sound.rt60_s)
    tail_R[: SAMPLE_RATE // 500] = 0.0  # the first wall is 2 ms away
    tail_R *= 10.0 ** (sound.echo_db / 20.0) / np.sqrt(np.sum(np.square(tail_R)))
    block = _FFT_SIZE - num_echoes
    num_blocks = -(-len(dry_S) // block)
    blocks = np.zeros((num_blocks, block), np.float32)
    blocks.reshape(-1)[: len(dry_S)] = dry_S
    spectra = np.fft.rfft(blocks, _FFT_SIZE) * np.fft.rfft(tail_R.astype(np.float32), _FFT_SIZE)
    parts = np.fft.irfft(spectra, _FFT_SIZE).astype(np.float32)
    wet_S = np.zeros(num_blocks * block + num_echoes, np.float32)
    for index, part in enumerate(parts):
        wet_S[index * block :][:_FFT_SIZE] += part
    return wet_S[: len(dry_S)]


def _noise(length: int, slope: float, rng: Generator) -> Pcm:
    """Unit power, its spectrum falling as frequency to the minus ``slope``; every two seconds the
    same, which it does not show."""
    parts = rng.standard_normal((_FFT_SIZE // 2 + 1, 2), np.float32)
    hz = np.maximum(np.fft.rfftfreq(_FFT_SIZE, 1 / SAMPLE_RATE), 20.0)
    spectrum = parts.view(np.complex64)[:, 0] * (hz ** (-slope / 2.0)).astype(np.float32)
    period = np.fft.irfft(spectrum, _FFT_SIZE).astype(np.float32)
    power = np.mean(np.square(period[:length], dtype=np.float64))
    return np.resize(period / np.float32(np.sqrt(power)), length)


def _music(length: int, rng: Generator) -> Pcm:
    """Unit power: plucked notes of one scale over four chords, again and again."""
    beat = round(float(rng.uniform(0.2, 0.45)) * SAMPLE_RATE)
    key_hz = 110.0 * 2.0 ** (int(rng.integers(12)) / 12.0)
    bar = np.zeros(16 * beat, np.float32)
    time_N = np.arange(4 * beat, dtype=np.float32) / SAMPLE_RATE
    for step in range(16):
        chord = (0, 7, 9, 5)[step // 4]  # in semitones above the key
        tones = [int(rng.choice([12, 16, 19, 24]))] + ([0, 7] if step % 4 == 0 else [])
        for tone in tones:
            hz = key_hz * 2.0 ** ((chord + tone) / 12.0)
            note_N = np.exp(-3.0 * time_N) * sum(
                np.sin(np.float32(2.0 * np.pi * hz * over) * time_N) / over for over in (1, 2, 3)
            )
            at = (step * beat + np.arange(len(note_N))) % len(bar)  # the last ones ring on
            bar[at] += note_N
    bar /= np.sqrt(np.mean(np.square(bar)))
    return np.resize(bar, length)
