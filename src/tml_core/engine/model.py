"""The model as its users meet it: a checkpoint in memory that starts sequences.

Legend: T positions, V vocabulary.
"""

import json
import os
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tml_core.engine.cuda_model import on_cuda, require_cuda
from tml_core.engine.kv_budget import KvLimits, kv_budget
from tml_core.engine.runner import StepInput, StepRunner
from tml_core.errors import CheckpointError, InvalidArgument, InvalidType
from tml_core.media.dmel import DmelConfig, DmelStream
from tml_core.media.patches import num_patches
from tml_core.media.segments import Audio, Block, Image, OwnAudio, Segment, Tokens
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig, TextConfig, bundled_path
from tml_core.model.cuda_backbone import CudaBackbone
from tml_core.model.kv_store import KvStore
from tml_core.model.tokenizer import load_tokenizer
from tml_core.model.weights import load_weights
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.store import SequenceStore
from tml_core.sequence.token_log import IMAGE_ID
from tml_core.sequence.values import Carry, Retention

__all__ = ["Model", "load_model", "weights_fingerprint"]

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_BUNDLED: Final = "nano"
_FINGERPRINT_SAMPLES: Final = 16
_FINGERPRINT_SAMPLE_BYTES: Final = 4096


class Model:
    """A loaded model: its weights, the memory of its sequences, the way from segments to logits.

    ``fingerprint`` names configuration and weights. ``is_trained`` is False for a model whose
    weights are a random initialisation. ``store`` and ``runner`` serve all its sequences, from one
    thread at a time. ``encoder_s``: time in the encoders so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone | CudaBackbone,
        store: SequenceStore,
        *,
        tokenizer: Tokenizer | None = None,
        max_step_tokens: int = 512,
    ) -> None:
        self.config: Final = config
        self.backbone: Final = backbone
        self.store: Final = store
        self.tokenizer: Final = tokenizer
        self.runner: Final = StepRunner(backbone, store, max_step_tokens=max_step_tokens)
        self.dmel_config: Final = _dmel_config(config)
        self.encoder_s = 0.0

    @property
    def device(self) -> torch.device:
        """Where weights, sequences and logits are."""
        return self.store.kv.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and sequence state: bfloat16 or float32."""
        return self.backbone.dtype

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    @property
    def is_trained(self) -> bool:
        return self.config.is_trained

    @property
    def vocab_size(self) -> int:
        """V: entries of a row of logits."""
        return self.backbone.vocab_size

    def __repr__(self) -> str:
        text = self.config.text
        kind = "" if self.is_trained else "untrained, "
        return (
            f"Model({kind}{text.num_layers} layers of {text.hidden_size}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )

    def logits(self, segments: SequenceOf[Segment | Block]) -> Tensor:
        """Logits of a whole sequence of segments: float32 [T, V], on the model's device.

        The same bits as `Sequence.extend` over any cutting of them: it runs the same steps on a
        sequence that is closed again. A rest of raw audio is filled up with zeros.
        Raises InvalidArgument for what the model does not take, PoolExhausted without room.
        """
        with self.new_sequence() as sequence:
            return sequence.extend(segments, flush_audio=True)

    def new_sequence(self, *, seed: int = 0, retention: Retention | None = None) -> Sequence:
        """An empty sequence; close it, or use it in a ``with``.

        ``seed`` keys what is sampled on it; ``retention`` bounds what an endless one keeps.
        Raises PoolExhausted without a free slot.
        """
        carry = Carry()
        if self.dmel_config is not None:
            carry = Carry(audio=DmelStream(self.dmel_config).state())
        return Sequence(self.store, seed=seed, retention=retention, carry=carry, extender=self)

    def restore_sequence(self, path: str | Path) -> Sequence:
        """The sequence that `Sequence.snapshot` wrote to ``path``.

        Raises SnapshotError for a damaged file or one of another model, dtype or contract.
        """
        return Sequence.restore(self.store, path, extender=self)

    def prepare(
        self,
        sequence: Sequence,
        segments: SequenceOf[Segment | Block],
        *,
        flush_audio: bool = False,
    ) -> StepInput:
        """Embed what a sequence is about to append; nothing changes until the runner commits it."""
        framed, carry = self._framed(sequence.carry, segments, flush_audio)
        begin_s = time.perf_counter()
        embedded = self.backbone.embed(framed)
        self.encoder_s += time.perf_counter() - begin_s
        self._name_images(framed, embedded.token_ids)
        return StepInput(sequence, embedded.x_TD, embedded.token_ids, embedded.blocks, carry)

    def extend(
        self, sequence: Sequence, segments: SequenceOf[Segment | Block], flush_audio: bool
    ) -> Tensor:
        """What `Sequence.extend` does: append, and return the logits, float32 [T, V]."""
        step_input = self.prepare(sequence, segments, flush_audio=flush_audio)
        with self.runner.stage([step_input]) as (h_TD,):
            return self.backbone.logits(h_TD)

    def _framed(
        self, carry: Carry, segments: SequenceOf[Segment | Block], flush_audio: bool
    ) -> tuple[list[Segment | Block], Carry]:
        """The segments with raw audio as frames, and the carry after them."""
        if isinstance(segments, (Tokens, Audio, Image, Block)):
            raise InvalidType(
                f"segments: expected a sequence of segments, got one {type(segments).__name__}"
            )
        pieces = list(segments)
        last_raw = max((i for i, piece in enumerate(pieces) if _has_pcm(piece)), default=-1)
        if last_raw < 0 and not flush_audio:
            return pieces, carry
        if self.dmel_config is None or carry.audio is None:
            if last_raw < 0:
                return pieces, carry
            raise InvalidArgument("segments: this model has no audio encoder")
        stream = DmelStream(self.dmel_config)
        stream.restore(carry.audio)
        framed: list[Segment | Block] = []
        for i, piece in enumerate(pieces):
            if isinstance(piece, Block):
                parts = [_with_bins(part, stream) for part in piece.segments]
                framed.append(Block(parts))
            else:
                framed.append(_with_bins(piece, stream))
            if flush_audio and i == last_raw:
                framed.append(Audio(bins=stream.flush()))
        if flush_audio and last_raw < 0:
            framed.append(Audio(bins=stream.flush()))
        return framed, replace(carry, audio=stream.state())

    def _name_images(self, pieces: SequenceOf[Segment | Block], token_ids: Tensor) -> None:
        # The backbone only knows that a position is not text.
        start = 0
        for piece in pieces:
            for part in piece.segments if isinstance(piece, Block) else (piece,):
                length = self._length(part)
                if isinstance(part, Image):
                    token_ids[start : start + length] = IMAGE_ID
                start += length

    def _length(self, part: Segment) -> int:
        if isinstance(part, Tokens):
            return len(part.ids)
        if isinstance(part, Audio):
            return 0 if part.bins is None else len(part.bins)
        if isinstance(part, OwnAudio):
            return len(part.mel)
        if part.patches is not None:
            return len(part.patches)
        if part.rgb is None or self.config.vision is None:
            return 0
        height, width = part.rgb.shape[:2]
        return num_patches(height, width, self.config.vision.patch_size)


def load_model(
    path: str | Path = _BUNDLED,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "bfloat16",
    max_sequences: int = 8,
    max_positions: int | None = None,
    kv_memory_bytes: int | None = None,
    max_step_tokens: int = 512,
) -> Model:
    """Load a checkpoint directory (config.json and safetensors), or ``"nano"``, the bundled one.

    ``device``: "cpu", or "cuda" (an H100 or H200; bfloat16 alone), where all but token ids then is.
    ``dtype``: "bfloat16" or "float32". ``max_sequences``: how many may be open at once, forks
    included. ``max_positions``: length of a sequence, the model's own limit by default.
    ``kv_memory_bytes``: what all sequences together may take, a quarter of this machine's memory
    by default, taken as it is used; on a GPU nearly all that is free, taken at once.
    ``max_step_tokens``: positions of one step.

    Raises CheckpointError for a directory that is not such a model, InvalidArgument for an unknown
    name, dtype or limit, Unsupported, saying why, for a device this machine or build does not
    have, OutOfDeviceMemory with what would fit one.
    """
    torch_device, torch_dtype = _as_device(device), _as_dtype(dtype)
    if torch_device.type == "cuda":
        torch_device = require_cuda(torch_device, torch_dtype)
    limits = KvLimits(max_sequences, max_positions, kv_memory_bytes, max_step_tokens)
    directory = _directory(path)
    config = ModelConfig.from_path(directory)
    limits.check(config.text)
    weights = load_weights(directory, config, torch_dtype)
    fingerprint = weights_fingerprint(config, weights)
    backbone: Backbone | CudaBackbone
    kv: KvStore
    if torch_device.type == "cuda":
        backbone, kv = on_cuda(config, weights, limits, torch_device)
    else:
        kv = _kv_store(config.text, torch_dtype, limits)
        backbone = Backbone(config, weights, torch_dtype)
    return Model(
        config,
        backbone,
        SequenceStore(kv, fingerprint),
        tokenizer=load_tokenizer(directory),
        max_step_tokens=max_step_tokens,
    )


def weights_fingerprint(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """A name for a configuration with these weights: hex, the same wherever they are loaded.

    Of a large tensor only evenly spaced samples are read, so that it costs no second pass over the
    checkpoint: it tells models apart, it does not authenticate them.
    """
    hasher = blake2b(json.dumps(config.to_dict(), sort_keys=True).encode(), digest_size=16)
    for name in sorted(weights):
        tensor = weights[name]
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        if raw.size <= _FINGERPRINT_SAMPLES * _FINGERPRINT_SAMPLE_BYTES:
            hasher.update(raw.data)
            continue
        stride = (raw.size - _FINGERPRINT_SAMPLE_BYTES) // (_FINGERPRINT_SAMPLES - 1)
        for i in range(_FINGERPRINT_SAMPLES):
            hasher.update(raw[i * stride : i * stride + _FINGERPRINT_SAMPLE_BYTES].data)
    return hasher.hexdigest()


def _kv_store(config: TextConfig, dtype: torch.dtype, limits: KvLimits) -> KvStore:
    budget_bytes = limits.kv_memory_bytes
    if budget_bytes is None:
        budget_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    budget = kv_budget(config, dtype, limits, budget_bytes)
    return KvStore(config, dtype, limits.max_sequences, *budget)


def _dmel_config(config: ModelConfig) -> DmelConfig | None:
    audio = config.audio
    if audio is None:
        return None
    return DmelConfig(
        num_mel_bins=audio.num_mel_bins,
        num_levels=audio.num_levels,
        min_log10=audio.min_log10,
        max_log10=audio.max_log10,
    )


def _has_pcm(piece: Segment | Block) -> bool:
    parts = piece.segments if isinstance(piece, Block) else (piece,)
    return any(isinstance(part, Audio) and part.pcm is not None for part in parts)


def _with_bins(part: Segment, stream: DmelStream) -> Segment:
    if isinstance(part, Audio) and part.pcm is not None:
        return Audio(bins=stream.push(part.pcm))
    return part


def _as_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidArgument(f"device: expected 'cpu' or 'cuda', got {device!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device: expected 'cpu' or 'cuda', got {str(device)!r}")
    return found


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise InvalidArgument(f"dtype: expected one of {sorted(_DTYPES)}, got {dtype!r}")
    return found


def _directory(path: str | Path) -> Path:
    if isinstance(path, str) and path == _BUNDLED:
        return bundled_path(path)
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"load_model: expected {_BUNDLED!r} or a checkpoint directory, got {str(path)!r}"
        )
    return directory
