"""Vocoders: mel frames to sound as they come. `GriffinLim` needs no weights.

Legend: F frames, S samples, M mel channels, N frequencies, W window length, K frames in work.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media._checks import Pcm, positive_int
from tml_core.media._mel_scale import filter_runs, mel_filters
from tml_core.media.mel import Mel, MelConfig, mel_array, mel_energy

__all__ = ["GriffinLim", "Vocoder", "VocoderState"]

_TINY = 1e-9  # a spectral line below this has no phase


@dataclass(frozen=True, eq=False)
class VocoderState:
    """All a vocoder remembers. ``name``: which vocoder's it is; ``arrays``: its own, float64, not
    to be written."""

    name: str
    arrays: tuple[NDArray[np.float64], ...]


class Vocoder(Protocol):
    """Mel frames in, the same stretch of sound out, a fixed ``delay`` later.

    The samples of any sequence of pushes equal those of one push of the whole.
    """

    @property
    def config(self) -> MelConfig:
        """The frames it takes."""

    @property
    def delay(self) -> int:
        """Samples by which the sound is late: a frame's own samples need the frames after it."""

    def push(self, mel_FM: Mel | torch.Tensor) -> Pcm:
        """float32 [F * hop] in [-1, 1] for log10 frames float32 [F, M]; after a start the first
        ``delay`` samples are zeros."""

    def flush(self) -> Pcm:
        """What is still to be heard, float32 [delay]; then the vocoder is as it was made."""

    def reset(self) -> None:
        """Back to how the vocoder was made."""

    def state(self) -> VocoderState:
        """The current state."""

    def restore(self, state: VocoderState) -> None:
        """Go back (or over) to ``state``."""

    def copy(self) -> Self:
        """A vocoder that goes on from here on its own."""


class GriffinLim:
    """Phases by iterating on the last frames while they come (RTISI with look-ahead).

    Zhu, Beauregard, Wyse, "Real-Time Signal Estimation From Modified Short-Time Fourier Transform
    Magnitude Spectra" (2007). A frame's phases are refined ``num_iterations`` times when it comes
    and with each of the ``lookahead`` frames after it, against the sound that is already decided.
    Spectra come from mel by multiplicative updates of a non-negative least squares.

    Each frame is computed by itself with fixed shapes in float64, so the bits do not depend on how
    frames are pushed.
    """

    def __init__(
        self, config: MelConfig | None = None, lookahead: int = 1, num_iterations: int = 8
    ) -> None:
        self._config = MelConfig() if config is None else config
        if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0:
            raise InvalidArgument(f"lookahead: expected an integer of at least 0, got {lookahead}")
        self._lookahead = lookahead
        self._num_iterations = positive_int("num_iterations", num_iterations)
        self._tables = _tables(self._config, lookahead)
        self._state = self._tables.silence

    @property
    def config(self) -> MelConfig:
        """The frames it takes."""
        return self._config

    @property
    def delay(self) -> int:
        """Samples by which the sound is late."""
        return self._config.window + (self._lookahead - 1) * self._config.hop

    def push(self, mel_FM: Mel | torch.Tensor) -> Pcm:
        """See `Vocoder.push`. Raises InvalidArgument or InvalidType for anything else."""
        frames_FM = mel_array("mel_FM", mel_FM, self._config).astype(np.float64)
        energy_FM = mel_energy(frames_FM, self._config)
        return self._run([self._tables.magnitude(energy_M) for energy_M in energy_FM])

    def flush(self) -> Pcm:
        """See `Vocoder.flush`."""
        silence_N = np.zeros(self._config.window // 2 + 1)
        tail_S = self._run([silence_N] * (self.delay // self._config.hop))
        self.reset()
        return tail_S

    def reset(self) -> None:
        """Back to how the vocoder was made."""
        self._state = self._tables.silence

    def state(self) -> VocoderState:
        """The current state."""
        return self._state

    def restore(self, state: VocoderState) -> None:
        """Go back (or over) to ``state``. Raises InvalidType or InvalidArgument for another's."""
        if not isinstance(state, VocoderState):
            raise InvalidType(f"state: expected VocoderState, got {type(state).__name__}")
        want = self._tables.silence
        shapes = [list(one.shape) for one in want.arrays]
        got = [list(one.shape) for one in state.arrays]
        if state.name != want.name or got != shapes:
            raise InvalidArgument(
                f"state: expected that of {want.name} with arrays {shapes}, "
                f"got that of {state.name} with {got}"
            )
        self._state = state

    def copy(self) -> "GriffinLim":
        """A vocoder that goes on from here on its own."""
        twin = GriffinLim(self._config, self._lookahead, self._num_iterations)
        twin._state = self._state
        return twin

    def _run(self, magnitudes: list[NDArray[np.float64]]) -> Pcm:
        hop = self._config.hop
        pcm_S = np.empty(len(magnitudes) * hop, np.float32)
        decided_S, frames_KW, magnitude_KN = self._state.arrays
        for index, magnitude_N in enumerate(magnitudes):
            hop_S, decided_S, frames_KW, magnitude_KN = self._step(
                magnitude_N, decided_S, frames_KW, magnitude_KN
            )
            pcm_S[index * hop : (index + 1) * hop] = np.clip(hop_S, -1.0, 1.0)
        arrays = (decided_S, frames_KW, magnitude_KN)
        self._state = VocoderState(self._state.name, arrays)
        return pcm_S

    def _step(
        self,
        magnitude_N: NDArray[np.float64],
        decided_S: NDArray[np.float64],
        frames_KW: NDArray[np.float64],
        magnitude_KN: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], ...]:
        """One frame: the hop that is now final, and the state after it.

        ``decided_S`` [window + lookahead * hop]: overlap-added frames that do not change any more,
        from the oldest frame in work on. ``frames_KW`` [lookahead, W], ``magnitude_KN``: in work.
        """
        tables, hop, window = self._tables, self._config.hop, self._config.window
        magnitude_KN = np.concatenate((magnitude_KN, magnitude_N[None]))
        # The new frame begins with the phases of what is known of its stretch.
        known_S = _overlap_add(decided_S, frames_KW, hop) * tables.known_gain_S
        spectrum_N = np.fft.rfft(known_S[-window:] * tables.window_W)
        new_W = np.fft.irfft(magnitude_N * tables.phases(spectrum_N), window) * tables.window_W
        frames_KW = np.concatenate((frames_KW, new_W[None]))
        before_KN: NDArray[np.complex128] | None = None
        for _ in range(self._num_iterations):
            sound_S = _overlap_add(decided_S, frames_KW, hop) * tables.gain_S
            pieces_KW = sliding_window_view(sound_S, window)[::hop] * tables.window_W
            spectrum_KN = np.fft.rfft(pieces_KW)
            # Overshooting in the direction of the last change converges faster.
            ahead_KN = spectrum_KN
            if before_KN is not None:
                ahead_KN = spectrum_KN + 0.9 * (spectrum_KN - before_KN)
            before_KN = spectrum_KN
            frames_KW = np.fft.irfft(magnitude_KN * tables.phases(ahead_KN), window)
            frames_KW *= tables.window_W
        decided_S = decided_S.copy()
        decided_S[:window] += frames_KW[0]
        final_S = decided_S[:hop] * tables.steady_gain
        decided_S = np.concatenate((decided_S[hop:], np.zeros(hop)))
        return final_S, decided_S, frames_KW[1:], magnitude_KN[1:]


class _Tables(NamedTuple):
    window_W: NDArray[np.float64]
    centred_N: NDArray[np.float64]  # phases of a click in the middle of the window
    gain_S: NDArray[np.float64]  # 1 / sum of squared windows, with and without the newest frame
    known_gain_S: NDArray[np.float64]
    steady_gain: float
    index_MK: NDArray[np.intp]
    weight_MK: NDArray[np.float64]
    channel_NC: NDArray[np.intp]  # the channels that see a frequency, and how much
    share_NC: NDArray[np.float64]
    norm_M: NDArray[np.float64]
    silence: VocoderState

    def phases(self, spectrum: NDArray[np.complex128]) -> NDArray[np.complex128]:
        """Unit vectors along ``spectrum``."""
        size = np.abs(spectrum)
        has_phase = size > _TINY
        out: NDArray[np.complex128] = np.where(
            has_phase, spectrum / np.where(has_phase, size, 1.0), self.centred_N
        )
        return out

    def magnitude(self, energy_M: NDArray[np.float64]) -> NDArray[np.float64]:
        """A spectrum [N] whose mel energies are ``energy_M``."""
        spread_N = (energy_M[self.channel_NC] * self.share_NC).sum(axis=1)
        magnitude_N: NDArray[np.float64] = (
            (energy_M / self.norm_M)[self.channel_NC] * self.share_NC
        ).sum(axis=1)
        for _ in range(12):
            got_M = (magnitude_N[self.index_MK] * self.weight_MK).sum(axis=1)
            back_N = (got_M[self.channel_NC] * self.share_NC).sum(axis=1)
            magnitude_N = magnitude_N * (spread_N / (back_N + 1e-12))
        return magnitude_N


@lru_cache(maxsize=8)
def _tables(config: MelConfig, lookahead: int) -> _Tables:
    window, hop = config.window, config.hop
    window_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    filters_MN = mel_filters(config.sample_rate, window, config.num_mel_bins)
    index_MK, weight_MK = filter_runs(filters_MN)
    num_lines = window // 2 + 1
    # Triangles overlap their neighbours only: a frequency is seen by two channels at most.
    channel_NC = np.argsort(-filters_MN, axis=0, kind="stable")[:2].T
    share_NC = np.take_along_axis(filters_MN, channel_NC.T, axis=0).T
    overlap_M = (filters_MN @ filters_MN.T).sum(axis=1)
    return _Tables(
        window_W=window_W,
        centred_N=np.where(np.arange(num_lines) % 2, -1.0, 1.0),
        gain_S=_gain(window_W, hop, lookahead, lookahead + 1),
        known_gain_S=_gain(window_W, hop, lookahead, lookahead),
        steady_gain=hop / float((window_W**2).sum()),
        index_MK=index_MK,
        weight_MK=weight_MK,
        channel_NC=channel_NC,
        share_NC=share_NC,
        norm_M=np.maximum(overlap_M, 1e-12),
        silence=VocoderState(
            f"griffin-lim {config.hop}/{config.window}/{config.num_mel_bins}",
            (
                np.zeros(window + lookahead * hop),
                np.zeros((lookahead, window)),
                np.zeros((lookahead, num_lines)),
            ),
        ),
    )


def _gain(
    window_W: NDArray[np.float64], hop: int, lookahead: int, num_frames: int
) -> NDArray[np.float64]:
    """1 / the sum of squared windows over the frames in work, of which ``num_frames`` are there."""
    window = len(window_W)
    sum_S = np.zeros(window + lookahead * hop)
    for frame in range(1 - window // hop, num_frames):
        start = frame * hop
        low, high = max(start, 0), min(start + window, len(sum_S))
        sum_S[low:high] += window_W[low - start : high - start] ** 2
    # Where hardly any window reaches, the sum of few small terms would blow up the noise.
    return 1.0 / np.maximum(sum_S, 0.05)


def _overlap_add(
    base_S: NDArray[np.float64], frames_KW: NDArray[np.float64], hop: int
) -> NDArray[np.float64]:
    sound_S = base_S.copy()
    for index, frame_W in enumerate(frames_KW):
        sound_S[index * hop : index * hop + len(frame_W)] += frame_W
    return sound_S
