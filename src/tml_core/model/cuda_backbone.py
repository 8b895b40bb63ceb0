"""The backbone on a Hopper GPU: what `Backbone` is on the CPU, with everything in device memory.

Token ids, levels and sampling rows come from the host and drawn tokens go back to it; embeddings,
hidden states and logits stay on the device.

Shape suffixes: T tokens, D hidden size, V vocabulary, B rows to sample.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tml_core.errors import InvalidArgument, InvalidType
from tml_core.media.patches import image_patches
from tml_core.media.segments import Audio, Block, Image, Segment, Tokens
from tml_core.model.backbone import EmbeddedSegments
from tml_core.model.config import ENCODER_NORM_EPS, ModelConfig
from tml_core.model.cuda_decoder import CudaDecoder
from tml_core.model.cuda_graphs import Capture, StepGraphs, capture_graphs
from tml_core.model.cuda_store import CudaKvStore
from tml_core.model.flow import FlowHead
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.ops import cuda
from tml_core.ops.lm_head import SampleRows

__all__ = ["CudaBackbone"]


class CudaBackbone:
    """A model's weights on ``device``, packed there once, and the steps that use them.

    ``weights``: canonical names, bf16, on the host; consumed. Raises Unsupported for shapes the
    kernels do not have, and what torch raises when the device's memory is too small. ``capture``:
    how steps that come again are recorded, CUDA graphs on a GPU by default. ``flow``: None, for it
    does not speak.
    """

    dtype: Final = torch.bfloat16
    flow: Final[FlowHead | None] = None

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: torch.device,
        *,
        capture: Capture | None = None,
    ) -> None:
        self.config = config
        self.device = device

        def take(name: str) -> Tensor:
            return weights.pop(name).to(device).contiguous()

        language = "model.language_model.embed_tokens."
        self._embed_table = take(language + "weight")
        self._embed_norm = take(language + "embed_norm.weight")
        if config.audio is not None:
            audio = "model.audio_tower."
            self._dmel_table = take(audio + "embed_audio_tokens.embed_audio_tokens.weight")
            self._dmel_norm = take(audio + "norm.weight")
        self._hmlp: cuda.CudaHmlp | None = None
        if config.vision is not None:
            vision = "model.vision_tower."
            layers = config.vision.layers(config.text.hidden_size)
            self._hmlp = cuda.CudaHmlp(
                folds=tuple((layer.t_fold, layer.hw_fold) for layer in layers),
                projections=tuple(
                    cuda.pack_weight(take(f"{vision}encoder_layers.{index}.projection.weight"))
                    for index in range(len(layers))
                ),
                norms=tuple(
                    take(f"{vision}encoder_layers.{index}.layer_norm.weight")
                    for index, layer in enumerate(layers)
                    if layer.has_norm
                ),
                final_norm=take(vision + "final_norm.weight"),
                eps=ENCODER_NORM_EPS,
            )
        head = weights.pop("lm_head.weight")[: self.vocab_size]
        self._head = cuda.pack_weight(head.to(device).contiguous())
        self.decoder = CudaDecoder(config.text, weights, device)
        if weights:
            raise InvalidArgument(f"weights: unused tensors {sorted(weights)[:3]}")
        if capture is None and device.type == "cuda":
            capture = capture_graphs(device)
        self._capture = capture
        self._graphs: tuple[Tensor, StepGraphs] | None = None  # and the place they read batches at

    @property
    def vocab_size(self) -> int:
        """Entries of a logits row: the vocabulary without its padding."""
        return self.config.text.unpadded_vocab_size

    def embed(self, segments: Sequence[Segment | Block]) -> EmbeddedSegments:
        """As `Backbone.embed`; ``x_TD`` is on the device, ``token_ids`` on the host."""
        rows: list[Tensor] = []
        ids: list[Tensor] = []
        blocks: list[tuple[int, int]] = []
        num_tokens = 0
        for segment in segments:
            start = num_tokens
            for piece in segment.segments if isinstance(segment, Block) else (segment,):
                x_TD = self._embed_piece(piece)
                rows.append(x_TD)
                if isinstance(piece, Tokens):
                    ids.append(torch.as_tensor(piece.ids))
                else:
                    ids.append(torch.full((x_TD.shape[0],), -1, dtype=torch.int64))
                num_tokens += x_TD.shape[0]
            if isinstance(segment, Block) and num_tokens > start:
                blocks.append((start, num_tokens))
        if not rows:
            rows.append(self._embed_table.new_empty(0, self.config.text.hidden_size))
            ids.append(torch.empty(0, dtype=torch.int64))
        x_TD = rows[0] if len(rows) == 1 else torch.cat(rows)
        return EmbeddedSegments(x_TD, ids[0] if len(ids) == 1 else torch.cat(ids), tuple(blocks))

    def embed_ids(self, ids_T: Tensor, *, out_TD: Tensor | None = None) -> Tensor:
        """Embeddings [T, D], on the device, of token ids on the host, int64 [T].

        Raises InvalidArgument for one outside the vocabulary.
        """
        size = self._embed_table.shape[0]
        wrong = ((ids_T < 0) | (ids_T >= size)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise InvalidArgument(f"embed: ids[{at}] must be in [0, {size}), got {int(ids_T[at])}")
        ids_D = ids_T.to(self.device)
        x_TD = cuda.embed(ids_D, self._embed_table, self._embed_norm, self.config.text.rms_eps)
        return x_TD if out_TD is None else out_TD.copy_(x_TD)

    def step(
        self, x_TD: Tensor, batch: StepBatch, kv: KvStore, *, out_TD: Tensor | None = None
    ) -> Tensor:
        """All layers over a ragged step, in the order of the current stream: x_TD [T, D] on the
        device, overwritten; ``batch`` on the host. Returns h [T, D] on the device.

        Raises InvalidArgument for a store of another device.
        """
        if not isinstance(kv, CudaKvStore) or kv.device != self.device:
            raise InvalidArgument(
                f"step: kv must be a CudaKvStore on {self.device}, got a "
                f"{type(kv).__name__} on {kv.device}"
            )
        if x_TD.shape != (batch.num_tokens, self.config.text.hidden_size):
            raise InvalidArgument(
                f"step: x must be [{batch.num_tokens}, {self.config.text.hidden_size}], "
                f"got {list(x_TD.shape)}"
            )
        batch_D = kv.upload(batch)
        if self._capture is None:
            h_TD = self.decoder.step(x_TD, batch_D, kv)
        else:
            h_TD = self._step_graphs(kv, self._capture).step(x_TD, batch_D)
        return h_TD if out_TD is None else out_TD.copy_(h_TD)

    def logits(self, h_TD: Tensor) -> Tensor:
        """fp32 [T, V], on the device, of hidden states the step returned."""
        return cuda.linear(h_TD, self._head, torch.float32)

    def logprobs(self, h_TD: Tensor, targets_T: Tensor) -> Tensor:
        """fp32 [T], on the device: log-probability of ``targets_T`` (int64, on the host).

        Raises InvalidArgument for a target outside the vocabulary.
        """
        wrong = ((targets_T < 0) | (targets_T >= self.vocab_size)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise InvalidArgument(
                f"logprobs: targets[{at}] must be in [0, {self.vocab_size}), "
                f"got {int(targets_T[at])}"
            )
        return cuda.lm_head_logprobs(h_TD, self._head, targets_T.to(self.device))

    def sample(
        self, h_BD: Tensor, rows: SampleRows, *, out_B: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token a row: (ids int64 [B], log-probabilities fp32 [B]), both on the host, for which
        it waits. ``rows`` is on the host."""
        filtered = bool((rows.top_k_B > 0).any()) or bool((rows.top_p_B < 1).any())
        device = self.device
        tokens_B, logprobs_B = cuda.lm_head_sample(
            h_BD.contiguous(),
            self._head,
            rows.temperature_B.to(device),
            rows.seed_B.to(device),
            rows.position_B.to(device),
            top_k_T=rows.top_k_B.to(device) if filtered else None,
            top_p_T=rows.top_p_B.to(device) if filtered else None,
            allowed=None if rows.allowed_BW is None else rows.allowed_BW.to(device),
        )
        if out_B is None:
            return tokens_B.cpu(), logprobs_B.cpu()
        return out_B[0].copy_(tokens_B), out_B[1].copy_(logprobs_B)

    def _step_graphs(self, kv: CudaKvStore, capture: Capture) -> StepGraphs:
        place = kv.upload.place
        if self._graphs is None or self._graphs[0] is not place:
            graphs = StepGraphs(lambda x_TD, batch: self.decoder.step(x_TD, batch, kv), capture)
            self._graphs = place, graphs
        return self._graphs[1]

    def _embed_piece(self, piece: Segment) -> Tensor:
        if isinstance(piece, Tokens):
            return self.embed_ids(torch.as_tensor(piece.ids))
        if isinstance(piece, Audio):
            return self._embed_audio(piece)
        if isinstance(piece, Image):
            return self._embed_image(piece)
        raise InvalidType(
            f"segments: expected Tokens, Audio, Image or Block, got {type(piece).__name__}"
        )

    def _embed_audio(self, audio: Audio) -> Tensor:
        config = self.config.audio
        if config is None:
            raise InvalidArgument("segments: this model has no audio encoder")
        bins = audio.bins
        if bins is None:
            raise InvalidArgument("segments: expected Audio(bins=...), got pcm")
        if bins.shape[1] != config.num_mel_bins:
            raise InvalidArgument(
                f"dmel_embed: bins must be [F, {config.num_mel_bins}], got {list(bins.shape)}"
            )
        if bins.numel() and not 0 <= int(bins.min()) <= int(bins.max()) < config.num_levels:
            raise InvalidArgument(
                f"dmel_embed: bins must be in [0, {config.num_levels}), "
                f"got {int(bins.min())} to {int(bins.max())}"
            )
        return cuda.dmel_embed(
            bins.contiguous().to(self.device), self._dmel_table, config.num_levels,
            self._dmel_norm, ENCODER_NORM_EPS,
        )  # fmt: skip

    def _embed_image(self, image: Image) -> Tensor:
        if self.config.vision is None or self._hmlp is None:
            raise InvalidArgument("segments: this model has no vision encoder")
        patches = image.patches
        if patches is None:
            assert image.rgb is not None  # Image holds one of the two
            patches = image_patches(
                image.rgb, image.second, patch_size=self.config.vision.patch_size
            )
        return cuda.hmlp(patches.to(self.device), self._hmlp)
