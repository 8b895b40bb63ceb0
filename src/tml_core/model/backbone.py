"""The backbone: encoders, decoder and vocabulary head of one Inkling model on the CPU.

Shape suffixes: T tokens, D hidden size, V vocabulary, B rows to sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media.patches import image_patches
from tml_core.media.segments import Audio, Block, Image, OwnAudio, Segment, Tokens
from tml_core.model.config import ENCODER_NORM_EPS, ModelConfig
from tml_core.model.decoder import Decoder
from tml_core.model.flow import SELF_EMBED, FlowHead, own_bins, own_table
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.model.token_loop import TokenLoop
from tml_core.ops.embed import dmel_embed, embed
from tml_core.ops.hmlp import HmlpWeights, hmlp
from tml_core.ops.linear import PackedWeight, pack_weight
from tml_core.ops.lm_head import SampleRows, lm_head_logits, lm_head_logprobs, lm_head_sample

__all__ = ["Backbone", "EmbeddedSegments"]


@dataclass(frozen=True)
class EmbeddedSegments:
    """Segments as the decoder takes them.

    ``x_TD``: embeddings in the model dtype. ``token_ids``: int64 [T], -1 where a position is not
    text. ``blocks``: [start, end) offsets of the pieces with bidirectional attention.
    """

    x_TD: Tensor
    token_ids: Tensor
    blocks: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return self.x_TD.shape[0]


class Backbone:
    """A model's weights in the kernels' layout and the steps that use them.

    ``weights``: canonical names of ``expected_shapes(config)`` in ``dtype``; consumed. ``flow`` is
    the head it speaks with, None without one.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise InvalidArgument(f"dtype: expected float32 or bfloat16, got {dtype}")
        self.config = config
        self.dtype = dtype
        text = config.text
        language = "model.language_model.embed_tokens."
        self._embed_table = weights.pop(language + "weight").contiguous()
        self._embed_norm = weights.pop(language + "embed_norm.weight")
        if config.audio is not None:
            audio = "model.audio_tower."
            self._dmel_table = weights.pop(audio + "embed_audio_tokens.embed_audio_tokens.weight")
            self._dmel_norm = weights.pop(audio + "norm.weight")
        self.flow = self._take_flow(weights)
        self._hmlp = self._take_hmlp(weights)
        # Pictures that were encoded beforehand; those that nobody embeds any more leave no trace.
        self._encoded: WeakKeyDictionary[Image, Tensor] = WeakKeyDictionary()
        self._head = pack_weight(weights.pop("lm_head.weight"))
        self.decoder = Decoder(text, weights, dtype)
        if weights:
            raise InvalidArgument(f"weights: unused tensors {sorted(weights)[:3]}")

    @property
    def vocab_size(self) -> int:
        """Entries of a logits row: the vocabulary without its padding."""
        return self.config.text.unpadded_vocab_size

    def embed(self, segments: Sequence[Segment | Block]) -> EmbeddedSegments:
        """Embed segments in order. Audio must be given as ``bins`` (framing belongs to the
        sequence, which carries samples from one append to the next).

        Raises InvalidArgument for a token id, level or patch the model does not have, for a
        modality it lacks, and for audio given as pcm; nothing is kept of a refused call.
        """
        ids: list[NDArray[np.int64]] = []
        # From where to where, levels or embeddings, and whose voice it is.
        media: list[tuple[int, int, Tensor, bool]] = []
        blocks: list[tuple[int, int]] = []
        num_tokens = 0
        for segment in segments:
            start = num_tokens
            for piece in segment.segments if isinstance(segment, Block) else (segment,):
                if isinstance(piece, Tokens):
                    found = torch.as_tensor(piece.ids).numpy()
                else:
                    part = self._encode(piece)
                    found = np.zeros(part.shape[0], np.int64)
                    is_own = isinstance(piece, OwnAudio)
                    media.append((num_tokens, num_tokens + part.shape[0], part, is_own))
                ids.append(found)
                num_tokens += len(found)
            if isinstance(segment, Block) and num_tokens > start:
                blocks.append((start, num_tokens))
        # One embedding of all positions, written over where there is sound or a picture.
        ids_T = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        token_ids = torch.from_numpy(ids_T)
        x_TD = self.embed_ids(token_ids)
        for start, end, part, is_own in media:
            if part.dtype == torch.int32:
                table_VD = self._own_table if is_own else self._dmel_table
                self._embed_levels(part, table_VD, x_TD[start:end])
            else:
                x_TD[start:end] = part
            ids_T[start:end] = -1
        return EmbeddedSegments(x_TD, token_ids, tuple(blocks))

    def embed_ids(self, ids_T: Tensor, *, out_TD: Tensor | None = None) -> Tensor:
        """Embeddings [T, D] of token ids, int64 [T]: those of ``embed([Tokens(ids)])``."""
        eps = self.config.text.rms_eps
        return embed(ids_T, self._embed_table, self._embed_norm, eps, out_TH=out_TD)

    def step(
        self, x_TD: Tensor, batch: StepBatch, kv: KvStore, *, out_TD: Tensor | None = None
    ) -> Tensor:
        """All layers over a ragged step; see ``Decoder.step``."""
        return self.decoder.step(x_TD, batch, kv, out_TD=out_TD)

    def logits(self, h_TD: Tensor) -> Tensor:
        """fp32 [T, V] of hidden states the step returned."""
        return lm_head_logits(h_TD, self._head, self.vocab_size)

    def logprobs(self, h_TD: Tensor, targets_T: Tensor) -> Tensor:
        """fp32 [T]: log-probability of ``targets_T`` (int64), without a [T, V] tensor."""
        return lm_head_logprobs(h_TD, self._head, self.vocab_size, targets_T)

    def sample(
        self, h_BD: Tensor, rows: SampleRows, *, out_B: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token a row: (ids int64 [B], log-probabilities fp32 [B])."""
        return lm_head_sample(h_BD, self._head, self.vocab_size, rows, out_B=out_B)

    def token_loop(self, kv: KvStore, max_rows: int, max_run: int) -> TokenLoop:
        """A loop over this model's tokens, for sequences of ``kv``."""
        return TokenLoop(*self._loop_parts(), kv, max_rows, max_run)

    def _loop_parts(self) -> tuple[Decoder, tuple[Tensor, Tensor, float], PackedWeight, int]:
        """What a `TokenLoop` needs of the model."""
        embed = self._embed_table, self._embed_norm, self.config.text.rms_eps
        return self.decoder, embed, self._head, self.vocab_size

    def _encode(self, piece: Segment) -> Tensor:
        """Levels of sound int32 [F, M], or the embeddings [P, D] of a picture."""
        if isinstance(piece, Image):
            return self._embed_image(piece)
        if not isinstance(piece, Audio | OwnAudio):
            raise InvalidType(
                "segments: expected Tokens, Audio, Image, OwnAudio or Block, "
                f"got {type(piece).__name__}"
            )
        if self.config.audio is None:
            raise InvalidArgument("segments: this model has no audio encoder")
        if isinstance(piece, OwnAudio):
            if self.flow is None:
                raise InvalidArgument("segments: this model has no audio-out head")
            return own_bins(self.flow.config, self.config.audio, piece.mel)
        if piece.bins is None:
            raise InvalidArgument("segments: expected Audio(bins=...), got pcm")
        return piece.bins

    def _embed_levels(self, bins_FM: Tensor, table_VD: Tensor, out_FD: Tensor) -> None:
        config, norm_D = self.config.audio, self._dmel_norm
        assert config is not None  # _encode has seen to it
        dmel_embed(bins_FM, table_VD, config.num_levels, norm_D, ENCODER_NORM_EPS, out_FH=out_FD)

    def encode_together(self, images: Sequence[Image]) -> None:
        """Encode pictures in one go, which reads the encoder's weights once; the next `embed` of
        each takes it from there. A picture's bits do not depend on the others.

        Raises InvalidArgument, with nothing kept, for one the model does not take.
        """
        patches = [self._patches(image) for image in images]
        if not patches:
            return
        encoder = self._encoder()
        for index, one in enumerate(patches):
            if tuple(one.shape[1:]) != encoder.patch_shape:
                raise InvalidArgument(
                    f"images[{index}]: patches must be [P, "
                    f"{', '.join(map(str, encoder.patch_shape))}], got {list(one.shape)}"
                )
        parts = hmlp(torch.cat(patches), encoder).split([len(one) for one in patches])
        self._encoded.update(zip(images, parts, strict=True))

    def _embed_image(self, image: Image) -> Tensor:
        known_PD = self._encoded.pop(image, None)
        return hmlp(self._patches(image), self._encoder()) if known_PD is None else known_PD

    def _encoder(self) -> HmlpWeights:
        if self._hmlp is None:
            raise InvalidArgument("segments: this model has no vision encoder")
        return self._hmlp

    def _patches(self, image: Image) -> Tensor:
        if self.config.vision is None:
            raise InvalidArgument("segments: this model has no vision encoder")
        patches = image.patches
        if patches is None:
            assert image.rgb is not None  # Image holds one of the two
            size = self.config.vision.patch_size
            patches = image_patches(image.rgb, image.second, patch_size=size)
        return patches

    def _take_flow(self, weights: dict[str, Tensor]) -> FlowHead | None:
        interaction, audio = self.config.interaction, self.config.audio
        if interaction is None or interaction.audio_out is None or audio is None:
            return None
        self_embed_D = weights.pop(SELF_EMBED)
        self._own_table = own_table(self._dmel_table, self_embed_D, audio.num_levels)
        return FlowHead(interaction.audio_out, weights)

    def _take_hmlp(self, weights: dict[str, Tensor]) -> HmlpWeights | None:
        config = self.config.vision
        if config is None:
            return None
        layers = config.layers(self.config.text.hidden_size)
        vision = "model.vision_tower."
        projections = [
            weights.pop(f"{vision}encoder_layers.{index}.projection.weight")
            for index in range(len(layers))
        ]
        return HmlpWeights(
            folds=tuple((layer.t_fold, layer.hw_fold) for layer in layers),
            projections=tuple(pack_weight(weight) for weight in projections),
            norms=tuple(
                weights.pop(f"{vision}encoder_layers.{index}.layer_norm.weight")
                for index, layer in enumerate(layers)
                if layer.has_norm
            ),
            final_norm=weights.pop(vision + "final_norm.weight"),
            eps=ENCODER_NORM_EPS,
        )
