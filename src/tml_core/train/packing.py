"""Transcripts, and the packed batches a training step takes: sequences end to end, no padding.

Legend: T positions of all sequences, B sequences, N text positions, F audio frames, M mel channels,
P patches, A blocks of own sound, K frames of one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import torch
from torch import Tensor

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.layout.state import Stream
from tml_core.media.segments import Audio, Block, Image, OwnAudio, Segment, Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.flow import own_bins
from tml_core.ops.linear_logp import IGNORED_TARGET

__all__ = ["SAMPLED_STREAMS", "PackedBatch", "Transcript"]

_OWN: Final = -2  # in place of the token id of a block of own sound

# What a model chooses itself; the rest came from outside or was put there by the layout.
SAMPLED_STREAMS: Final = frozenset(
    {Stream.TEXT, Stream.SILENCE, Stream.CONTROL, Stream.CALL, Stream.AUDIO}
)


@dataclass(frozen=True, eq=False)
class Transcript:
    """One sequence to learn from.

    ``segments``: its pieces in order; sound as bins and pictures as patches, for cutting them
    belongs to the layout.
    ``targets``: int64 [T], the token to predict after each position, -100 where there is no loss.
    ``streams``: uint8 [T], the `Stream` of each target, INPUT where there is no loss. AUDIO, which
    has no token, is the block of own sound that comes next.
    Raises InvalidArgument or InvalidType when these do not fit each other.
    """

    segments: Sequence[Segment | Block]
    targets: Tensor
    streams: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        length = sum(_length(part) for part in _parts(self.segments))
        for name, value, dtype in (
            ("targets", self.targets, torch.int64),
            ("streams", self.streams, torch.uint8),
        ):
            if value.dtype != dtype or list(value.shape) != [length]:
                raise InvalidArgument(
                    f"Transcript.{name}: expected {dtype} [{length}], one for each position, "
                    f"got {value.dtype} {list(value.shape)}"
                )

    @classmethod
    def next_tokens(
        cls,
        segments: Sequence[Segment | Block],
        streams: Sequence[Stream],
        loss_on: Collection[Stream] = SAMPLED_STREAMS,
    ) -> Self:
        """A transcript whose targets are its own next tokens, where their stream is in ``loss_on``.

        ``streams``: of every position, as `MicroTurnLayout.encode_session` gives them. A token
        that is its sequence's first has nothing before it and no loss.
        """
        pieces = [_ids(part) for part in _parts(segments)]
        ids_T = torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
        if len(streams) != len(ids_T):
            raise InvalidArgument(
                f"streams: expected {len(ids_T)}, one for each position, got {len(streams)}"
            )
        targets_T = torch.full_like(ids_T, IGNORED_TARGET)
        streams_T = torch.full(ids_T.shape, int(Stream.INPUT), dtype=torch.uint8)
        for position, stream in enumerate(streams):
            if stream not in loss_on or position == 0:
                continue
            if (ids_T[position] == _OWN) != (stream == Stream.AUDIO) or ids_T[position] == -1:
                raise InvalidArgument(
                    f"streams[{position}]: expected INPUT at a position that is not text, and "
                    f"AUDIO at own sound only, got {Stream(stream).name}"
                )
            if stream != Stream.AUDIO:
                targets_T[position - 1] = ids_T[position]
            streams_T[position - 1] = int(stream)
        return cls(segments, targets_T, streams_T)

    @property
    def num_tokens(self) -> int:
        """Positions."""
        return self.targets.shape[0]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Transcripts end to end, as `TrainableModel` takes them; made by `pack`.

    ``token_ids`` int64 [N], ``bins`` int32 [F, M], ``patches`` float32 [P, 2, size, size, 3]: what
    there is of each kind, in order; ``own_mel`` float32 [A, K, M], ``own_before`` float32 [A, M]
    (the frame said before each block) and ``own_bins`` int32 [A, M + 1] (as `dmel_embed` takes
    them): blocks of own sound. ``order`` int64 [T]: where each position's embedding stands when
    those of text, audio, image and own sound follow each other. ``own_after`` int64 [A]: the
    position before each block.  ``cu_tokens`` int32 [B + 1]: sequence b
    owns positions [cu_tokens[b], cu_tokens[b + 1]). ``visible_end`` int64 [T]: the last position
    of its sequence that each one sees. ``targets`` int64 [T], ``streams`` uint8 [T]: as in
    `Transcript`.
    """

    token_ids: Tensor
    bins: Tensor
    patches: Tensor
    own_mel: Tensor
    own_before: Tensor
    own_bins: Tensor
    own_after: Tensor
    order: Tensor
    cu_tokens: Tensor
    visible_end: Tensor
    targets: Tensor
    streams: Tensor

    @classmethod
    def pack(
        cls,
        transcripts: Sequence[Transcript],
        config: ModelConfig,
        *,
        max_positions: int | None = None,
    ) -> Self:
        """Check transcripts against a model and put them end to end.

        ``max_positions``: of one transcript, the model's own limit by default. Raises
        InvalidArgument naming the transcript that is empty, too long, or holds a token, a label, a
        level or a patch the model does not have; also for an empty batch.
        """
        if not transcripts:
            raise InvalidArgument("transcripts: expected at least one, got an empty batch")
        longest = config.text.max_positions if max_positions is None else max_positions
        packer = _Packer(config)
        for index, transcript in enumerate(transcripts):
            where = f"transcripts[{index}]"
            if not isinstance(transcript, Transcript):
                raise InvalidType(f"{where}: expected Transcript, got {type(transcript).__name__}")
            if not 1 <= transcript.num_tokens <= longest:
                raise InvalidArgument(
                    f"{where}: expected 1 to {longest} positions, got {transcript.num_tokens}"
                )
            packer.add(where, transcript)
        return cls(**packer.tensors())

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.targets.shape[0]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_tokens.shape[0] - 1

    @property
    def num_targets(self) -> int:
        """Positions with a loss."""
        return int((self.targets != IGNORED_TARGET).sum())

    @property
    def num_blocks(self) -> int:
        """A."""
        return self.own_mel.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


class _Packer:
    """The tensors of a batch, one transcript after the other."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        num_bins = config.audio.num_mel_bins if config.audio else 0
        vision = config.vision
        size = vision.patch_size if vision else 0
        self._ids = [torch.empty(0, dtype=torch.int64)]
        self._bins = [torch.empty(0, num_bins, dtype=torch.int32)]
        self._patches = [torch.empty(0, vision.temporal_size if vision else 2, size, size, 3)]
        head = config.interaction.audio_out if config.interaction else None
        self._head = head
        num_frames, num_channels = (head.num_frames, head.num_mel_bins) if head else (0, 0)
        self._own_mel = [torch.empty(0, num_frames, num_channels)]
        self._own_before = [torch.empty(0, num_channels)]
        self._own_bins = [torch.empty(0, num_channels + 1, dtype=torch.int32)]
        self._kinds: list[Tensor] = []  # of each position: 0 text, 1 audio, 2 image, 3 own sound
        self._visible: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._streams: list[Tensor] = []
        self._ends = [0]

    def add(self, where: str, transcript: Transcript) -> None:
        start = 0
        for piece_index, piece in enumerate(transcript.segments):
            first = start
            for part in _parts([piece]):
                if isinstance(part, OwnAudio) and start == 0:
                    raise InvalidArgument(
                        f"{where}.segments[{piece_index}]: own sound must follow something"
                    )
                start += self._add_part(f"{where}.segments[{piece_index}]", part)
            own = torch.arange(first, start)
            is_block = isinstance(piece, Block)
            self._visible.append(torch.full_like(own, start - 1) if is_block else own)
        targets_T = transcript.targets
        vocab_size = self._config.text.unpadded_vocab_size
        kept = targets_T[targets_T != IGNORED_TARGET]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < vocab_size:
            raise InvalidArgument(
                f"{where}: labels must be in [0, {vocab_size}) or {IGNORED_TARGET}, "
                f"got {int(kept.min())} to {int(kept.max())}"
            )
        self._targets.append(targets_T)
        self._streams.append(transcript.streams)
        self._ends.append(self._ends[-1] + start)

    def tensors(self) -> dict[str, Tensor]:
        kind_T = torch.cat(self._kinds)
        # A stable sort by kind is the way from positions to embeddings; the inverse is asked for.
        positions_T = kind_T.argsort(stable=True)
        order_T = torch.empty_like(positions_T)
        order_T[positions_T] = torch.arange(len(positions_T))
        return {
            "token_ids": torch.cat(self._ids),
            "bins": torch.cat(self._bins),
            "patches": torch.cat(self._patches),
            "own_mel": torch.cat(self._own_mel),
            "own_before": torch.cat(self._own_before),
            "own_bins": torch.cat(self._own_bins),
            "own_after": (kind_T == 3).nonzero()[:, 0] - 1,
            "order": order_T,
            "cu_tokens": torch.tensor(self._ends, dtype=torch.int32),
            "visible_end": torch.cat(self._visible),
            "targets": torch.cat(self._targets),
            "streams": torch.cat(self._streams),
        }

    def _add_part(self, where: str, part: Segment) -> int:
        if isinstance(part, Tokens):
            value, kind, into = torch.as_tensor(part.ids), 0, self._ids
            _require_range(where, "token ids", value, self._config.text.vocab_size)
        elif isinstance(part, Audio):
            value, kind, into = self._checked_bins(where, part), 1, self._bins
        elif isinstance(part, OwnAudio):
            value, kind, into = self._checked_own(where, part), 3, self._own_mel
        else:
            value, kind, into = self._checked_patches(where, part), 2, self._patches
        into.append(value)
        self._kinds.append(torch.full((len(value),), kind, dtype=torch.uint8))
        return len(value)

    def _checked_bins(self, where: str, part: Audio) -> Tensor:
        audio = self._config.audio
        if audio is None:
            raise InvalidArgument(f"{where}: this model has no audio encoder")
        bins_FM = _bins(part)
        if bins_FM.shape[1] != audio.num_mel_bins:
            raise InvalidArgument(
                f"{where}: bins must be [F, {audio.num_mel_bins}], got {list(bins_FM.shape)}"
            )
        _require_range(where, "bins", bins_FM, audio.num_levels)
        return bins_FM

    def _checked_own(self, where: str, part: OwnAudio) -> Tensor:
        """The blocks; what else is kept of them is added."""
        head, audio = self._head, self._config.audio
        if head is None or audio is None:
            raise InvalidArgument(f"{where}: this model has no audio-out head")
        mel_AKM = part.mel
        if list(mel_AKM.shape[1:]) != [head.num_frames, head.num_mel_bins]:
            raise InvalidArgument(
                f"{where}: own sound must be [A, {head.num_frames}, {head.num_mel_bins}], "
                f"got {list(mel_AKM.shape)}"
            )
        first_M = part.before
        if first_M is None:
            first_M = torch.full((head.num_mel_bins,), head.mel.min_log10)
        self._own_before.append(torch.cat((first_M[None], mel_AKM[:-1, -1])))
        self._own_bins.append(own_bins(head, audio, mel_AKM))
        return mel_AKM

    def _checked_patches(self, where: str, part: Image) -> Tensor:
        vision = self._config.vision
        if vision is None:
            raise InvalidArgument(f"{where}: this model has no vision encoder")
        size, patches = vision.patch_size, _patches(part)
        if list(patches.shape[1:]) != [vision.temporal_size, size, size, 3]:
            raise InvalidArgument(
                f"{where}: patches must be [P, {vision.temporal_size}, {size}, {size}, 3], "
                f"got {list(patches.shape)}"
            )
        return patches


def _parts(segments: Sequence[Segment | Block]) -> list[Segment]:
    """The segments, those inside blocks included. Raises InvalidType for anything else."""
    parts: list[Segment] = []
    for segment in segments:
        parts += segment.segments if isinstance(segment, Block) else [segment]
    for part in parts:
        if not isinstance(part, (Tokens, Audio, Image, OwnAudio)):
            raise InvalidType(
                "segments: expected Tokens, Audio, Image, OwnAudio or Block, "
                f"got {type(part).__name__}"
            )
    return parts


def _bins(audio: Audio) -> Tensor:
    if audio.bins is None:
        raise InvalidArgument("segments: expected Audio(bins=...), got pcm")
    return audio.bins


def _patches(image: Image) -> Tensor:
    if image.patches is None:
        raise InvalidArgument("segments: expected Image(patches=...), got rgb")
    return image.patches


def _length(part: Segment) -> int:
    if isinstance(part, Tokens):
        return len(part.ids)
    if isinstance(part, Audio):
        return len(_bins(part))
    if isinstance(part, OwnAudio):
        return len(part.mel)
    return len(_patches(part))


def _ids(part: Segment) -> Tensor:
    """Token ids of a segment's positions: -1 where they are not text, -2 at own sound."""
    if isinstance(part, Tokens):
        return torch.as_tensor(part.ids)
    return torch.full((_length(part),), _OWN if isinstance(part, OwnAudio) else -1)


def _require_range(where: str, what: str, values: Tensor, end: int) -> None:
    if values.numel() and int(values.max()) >= end:  # segments have none below 0
        raise InvalidArgument(f"{where}: {what} must be below {end}, got {int(values.max())}")
