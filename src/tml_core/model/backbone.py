"""The backbone: encoders, decoder and vocabulary head of one Inkling model on the CPU.

Shape suffixes: T tokens, D hidden size, V vocabulary, B rows to sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media.patches import image_patches
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.model.config import ENCODER_NORM_EPS, ModelConfig
from tml_core.model.decoder import Decoder
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.model.token_loop import TokenLoop
from tml_core.ops.embed import dmel_embed, embed
from tml_core.ops.hmlp import HmlpWeights, hmlp
from tml_core.ops.linear import pack_weight
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

    ``weights``: canonical names of ``expected_shapes(config)`` in ``dtype``; consumed.
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
        self._hmlp = self._take_hmlp(weights)
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
        rows: list[Tensor] = []
        ids: list[Tensor] = []
        blocks: list[tuple[int, int]] = []
        num_tokens = 0
        for segment in segments:
            start = num_tokens
            for piece in segment.segments if isinstance(segment, Block) else (segment,):
                x_TD, token_ids = self._embed_piece(piece)
                rows.append(x_TD)
                ids.append(token_ids)
                num_tokens += x_TD.shape[0]
            if isinstance(segment, Block) and num_tokens > start:
                blocks.append((start, num_tokens))
        if len(rows) == 1:
            return EmbeddedSegments(rows[0], ids[0], tuple(blocks))
        empty_TD = torch.empty(0, self.config.text.hidden_size, dtype=self.dtype)
        x_TD = torch.cat(rows) if rows else empty_TD
        token_ids = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
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
        embed = self._embed_table, self._embed_norm, self.config.text.rms_eps
        return TokenLoop(self.decoder, embed, self._head, self.vocab_size, kv, max_rows, max_run)

    def _embed_piece(self, piece: Segment) -> tuple[Tensor, Tensor]:
        if isinstance(piece, Tokens):
            ids = torch.as_tensor(piece.ids)
            x_TD = embed(ids, self._embed_table, self._embed_norm, self.config.text.rms_eps)
            return x_TD, ids
        if isinstance(piece, Audio):
            x_TD = self._embed_audio(piece)
        elif isinstance(piece, Image):
            x_TD = self._embed_image(piece)
        else:
            raise InvalidType(
                f"segments: expected Tokens, Audio, Image or Block, got {type(piece).__name__}"
            )
        return x_TD, torch.full((x_TD.shape[0],), -1, dtype=torch.int64)

    def _embed_audio(self, audio: Audio) -> Tensor:
        config = self.config.audio
        if config is None:
            raise InvalidArgument("segments: this model has no audio encoder")
        if audio.bins is None:
            raise InvalidArgument("segments: expected Audio(bins=...), got pcm")
        return dmel_embed(
            audio.bins, self._dmel_table, config.num_levels, self._dmel_norm, ENCODER_NORM_EPS
        )

    def _embed_image(self, image: Image) -> Tensor:
        if self.config.vision is None or self._hmlp is None:
            raise InvalidArgument("segments: this model has no vision encoder")
        patches = image.patches
        if patches is None:
            assert image.rgb is not None  # Image holds one of the two
            patches = image_patches(
                image.rgb, image.second, patch_size=self.config.vision.patch_size
            )
        return hmlp(patches, self._hmlp)

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
