"""Vocoders: mel frames to sound as they come. `GriffinLim` needs no weights.

Legend: F frames, S samples, M mel channels, N frequencies, W window length, K frames in work, R
sounds that are made together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
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
        ``delay`` samples come before the sound: nothing, then what its first window reaches."""

    def push_together(
        self, states: Sequence[VocoderState | None], mel_RFM: NDArray[np.float32]
    ) -> tuple[Pcm, list[VocoderState]]:
        """The same for several sounds, each from its state (None: from the start): float32
        [R, F * hop], and the states after it. The bits are those of each alone; the vocoder's own
        state is left as it is."""

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
        frames_FM = mel_array("mel_FM", mel_FM, self._config)
        pcm_1S, (self._state,) = self.push_together([self._state], frames_FM[None])
        return _only(pcm_1S)

    def push_together(
        self, states: Sequence[VocoderState | None], mel_RFM: NDArray[np.float32]
    ) -> tuple[Pcm, list[VocoderState]]:
        """See `Vocoder.push_together`. Raises InvalidArgument for another number of states, or
        another vocoder's."""
        if len(states) != len(mel_RFM):
            raise InvalidArgument(
                f"states: expected {len(mel_RFM)}, one for each sound, got {len(states)}"
            )
        known = [self._tables.silence if one is None else self._checked(one) for one in states]
        energy_RFM = mel_energy(mel_RFM.astype(np.float64), self._config)
        # One sound at a time, whose tables fit a cache.
        magnitudes = [self._tables.magnitude(energy_FM) for energy_FM in energy_RFM]
        return self._run(known, np.array(magnitudes))

    def flush(self) -> Pcm:
        """See `Vocoder.flush`."""
        num_frames = self.delay // self._config.hop
        silence_1FN = np.zeros((1, num_frames, self._config.window // 2 + 1))
        tail_1S, _ = self._run([self._state], silence_1FN)
        self.reset()
        return _only(tail_1S)

    def reset(self) -> None:
        """Back to how the vocoder was made."""
        self._state = self._tables.silence

    def state(self) -> VocoderState:
        """The current state."""
        return self._state

    def restore(self, state: VocoderState) -> None:
        """Go back (or over) to ``state``. Raises InvalidType or InvalidArgument for another's."""
        self._state = self._checked(state)

    def _checked(self, state: VocoderState) -> VocoderState:
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
        return state

    def copy(self) -> "GriffinLim":
        """A vocoder that goes on from here on its own."""
        twin = GriffinLim(self._config, self._lookahead, self._num_iterations)
        twin._state = self._state
        return twin

    def _run(
        self, states: Sequence[VocoderState], magnitude_RFN: NDArray[np.float64]
    ) -> tuple[Pcm, list[VocoderState]]:
        hop, (num_sounds, num_frames, _) = self._config.hop, magnitude_RFN.shape
        pcm_RS = np.empty((num_sounds, num_frames * hop), np.float32)
        arrays = [np.stack(part) for part in zip(*(one.arrays for one in states), strict=True)]
        for frame in range(num_frames):
            hop_RS, *arrays = self._step(magnitude_RFN[:, frame], *arrays)
            pcm_RS[:, frame * hop : (frame + 1) * hop] = np.clip(hop_RS, -1.0, 1.0)
        # Copies, so that no sound keeps what the others had.
        name = self._tables.silence.name
        after = [
            VocoderState(name, tuple(part[row].copy() for part in arrays))
            for row in range(num_sounds)
        ]
        return pcm_RS, after

    def _step(
        self,
        magnitude_RN: NDArray[np.float64],
        decided_RS: NDArray[np.float64],
        frames_RKW: NDArray[np.float64],
        magnitude_RKN: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], ...]:
        """One frame of each sound: the hop that is now final, and the state after it.

        ``decided_RS`` [R, window + lookahead * hop]: overlap-added frames that do not change any
        more, from the oldest frame in work on. ``frames_RKW`` [R, lookahead, W],
        ``magnitude_RKN``: in work.
        """
        tables, hop, window = self._tables, self._config.hop, self._config.window
        magnitude_RKN = np.concatenate((magnitude_RKN, magnitude_RN[:, None]), axis=1)
        # The new frame begins with the phases of what is known of its stretch.
        known_RS = _overlap_add(decided_RS, frames_RKW, hop) * tables.known_gain_S
        spectrum_RN = np.fft.rfft(known_RS[:, -window:] * tables.window_W)
        new_RW = np.fft.irfft(magnitude_RN * tables.phases(spectrum_RN), window) * tables.window_W
        frames_RKW = np.concatenate((frames_RKW, new_RW[:, None]), axis=1)
        before_RKN: NDArray[np.complex128] | None = None
        for _ in range(self._num_iterations):
            sound_RS = _overlap_add(decided_RS, frames_RKW, hop) * tables.gain_S
            pieces_RKW = sound_RS.take(tables.index_KW, axis=1) * tables.window_W
            spectrum_RKN = np.fft.rfft(pieces_RKW)
            # Overshooting in the direction of the last change converges faster.
            ahead_RKN = spectrum_RKN
            if before_RKN is not None:
                ahead_RKN = spectrum_RKN + 0.9 * (spectrum_RKN - before_RKN)
            before_RKN = spectrum_RKN
            frames_RKW = np.fft.irfft(magnitude_RKN * tables.phases(ahead_RKN), window)
            frames_RKW *= tables.window_W
        decided_RS = decided_RS.copy()
        decided_RS[:, :window] += frames_RKW[:, 0]
        final_RS = decided_RS[:, :hop] * tables.steady_gain
        rest_RS = np.zeros((len(decided_RS), hop))
        decided_RS = np.concatenate((decided_RS[:, hop:], rest_RS), axis=1)
        return final_RS, decided_RS, frames_RKW[:, 1:], magnitude_RKN[:, 1:]


def _only(pcm_1S: Pcm) -> Pcm:
    pcm_S: Pcm = pcm_1S[0]
    return pcm_S


class _Tables(NamedTuple):
    window_W: NDArray[np.float64]
    centred_N: NDArray[np.float64]  # phases of a click in the middle of the window
    gain_S: NDArray[np.float64]  # 1 / sum of squared windows, with and without the newest frame
    known_gain_S: NDArray[np.float64]
    steady_gain: float
    index_KW: NDArray[np.intp]  # where the frames in work stand in the sound
    index_MK: NDArray[np.intp]
    weight_MK: NDArray[np.float64]
    channel_CN: NDArray[np.intp]  # the two channels that see a frequency, and how much
    share_CN: NDArray[np.float64]
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

    def magnitude(self, energy_FM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Spectra [F, N] whose mel energies are ``energy_FM``."""
        # `take` keeps what is summed next to each other, so sums do not depend on F.

        def seen(value_FM: NDArray[np.float64]) -> NDArray[np.float64]:
            first_FN, second_FN = (
                value_FM.take(channel_N, axis=1) * share_N
                for channel_N, share_N in zip(self.channel_CN, self.share_CN, strict=True)
            )
            found_FN: NDArray[np.float64] = first_FN + second_FN
            return found_FN

        spread_FN = seen(energy_FM)
        magnitude_FN = seen(energy_FM / self.norm_M)
        for _ in range(12):
            got_FM = (magnitude_FN.take(self.index_MK, axis=1) * self.weight_MK).sum(axis=2)
            magnitude_FN = magnitude_FN * (spread_FN / (seen(got_FM) + 1e-12))
        return magnitude_FN


@lru_cache(maxsize=8)
def _tables(config: MelConfig, lookahead: int) -> _Tables:
    window, hop = config.window, config.hop
    window_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    filters_MN = mel_filters(config.sample_rate, window, config.num_mel_bins)
    index_MK, weight_MK = filter_runs(filters_MN)
    num_lines = window // 2 + 1
    # Triangles overlap their neighbours only: a frequency is seen by two channels at most.
    channel_CN = np.argsort(-filters_MN, axis=0, kind="stable")[:2]
    share_CN = np.take_along_axis(filters_MN, channel_CN, axis=0)
    overlap_M = (filters_MN @ filters_MN.T).sum(axis=1)
    return _Tables(
        window_W=window_W,
        centred_N=np.where(np.arange(num_lines) % 2, -1.0, 1.0),
        gain_S=_gain(window_W, hop, lookahead, lookahead + 1),
        known_gain_S=_gain(window_W, hop, lookahead, lookahead),
        steady_gain=hop / float((window_W**2).sum()),
        index_KW=hop * np.arange(lookahead + 1)[:, None] + np.arange(window),
        index_MK=index_MK,
        weight_MK=weight_MK,
        channel_CN=channel_CN,
        share_CN=share_CN,
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
    base_RS: NDArray[np.float64], frames_RKW: NDArray[np.float64], hop: int
) -> NDArray[np.float64]:
    sound_RS = base_RS.copy()
    length = frames_RKW.shape[2]
    for index in range(frames_RKW.shape[1]):
        sound_RS[:, index * hop : index * hop + length] += frames_RKW[:, index]
    return sound_RS
