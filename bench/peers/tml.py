"""Our engine on shape S: the model, one sequence, greedy sampling, as a session drives them."""

import time
from functools import cache

import torch
from torch import Tensor

from peers.engine import NUM_DECODED, TurnTime, real_context
from shape_s import TEXT_CONFIG, config, random_ids, weights
from tml_core.contract import PAGE_LEN
from tml_core.engine.model import Model
from tml_core.engine.sampler import RowBuffers, SampleRequest, SamplingParams
from tml_core.media.segments import Tokens
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.ops.lm_head import pack_allowed
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.store import SequenceStore
from tml_core.sequence.token_log import records, text_records

__all__ = ["TmlEngine", "make_model", "shape_s_model"]

_GREEDY = SamplingParams(temperature=0)
_STEP_TOKENS = 512


def make_model(
    model_config: ModelConfig,
    model_weights: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    num_sequences: int,
    num_positions: int,
) -> Model:
    """A model with room for that many positions in each sequence, its pages full of noise."""
    num_pages = num_sequences * (num_positions // PAGE_LEN + 1)
    num_sliding = num_sequences * 3 * (_STEP_TOKENS // PAGE_LEN + 1)
    kv = KvStore(model_config.text, dtype, num_sequences, num_positions, num_pages, num_sliding)
    generator = torch.Generator().manual_seed(1)
    for pages in (kv.global_pages, kv.sliding_pages):
        for page in pages:
            page.normal_(generator=generator)
    backbone = Backbone(model_config, model_weights, dtype)
    return Model(model_config, backbone, SequenceStore(kv), max_step_tokens=_STEP_TOKENS)


@cache
def shape_s_model() -> Model:
    """Shape S in bf16, one for the whole run."""
    return make_model(
        config(),
        weights(),
        torch.bfloat16,
        num_sequences=4,
        num_positions=TEXT_CONFIG["max_position_embeddings"],
    )


class TmlEngine:
    """One sequence of a model, driven as the engine's thread drives it: input by the runner, then
    single tokens in fixed memory, which enter the sequence together."""

    name = "tml_core"

    def __init__(self, model: Model, sequence: Sequence | None = None) -> None:
        self.model = model
        self.sequence = model.new_sequence() if sequence is None else sequence
        self._allowed = pack_allowed(torch.ones(1, model.vocab_size, dtype=torch.bool))[0]
        self._samples = RowBuffers(1, len(self._allowed))
        self._rows = StepBatch(1, 1)
        self._ids_1 = torch.zeros(1, dtype=torch.int64)
        width, dtype = model.config.text.hidden_size, model.backbone.dtype
        self._x_1D, self._h_1D = torch.zeros(2, 1, width, dtype=dtype)
        self._drawn = torch.zeros(1, dtype=torch.int64), torch.zeros(1)

    @property
    def context_len(self) -> int:
        return self.sequence.tip

    def grow(self, context_len: int) -> None:
        if len(ids := real_context(self.context_len, context_len)):
            self.model.runner.run([self.model.prepare(self.sequence, [Tokens(ids)])])
        while (missing := context_len - self.context_len) > 0:
            ids = random_ids(min(missing, _STEP_TOKENS), seed=self.context_len)
            self.sequence.reserve(len(ids))
            self.sequence.commit(records(ids.numpy(), torch.zeros_like(ids).numpy(), ids))

    def turn(self, ids: Tensor) -> TurnTime:
        sequence, backbone, kv = self.sequence, self.model.backbone, self.model.store.kv
        start = time.perf_counter()
        (h_TD,) = self.model.runner.run([self.model.prepare(sequence, [Tokens(ids)])])
        tokens = [self._choose(h_TD[-1:], sequence.tip)]
        middle = time.perf_counter()
        tip, slot = sequence.tip, sequence.slot.index
        sequence.reserve(NUM_DECODED)
        for position in range(tip, tip + NUM_DECODED):
            self._rows.fill_single((slot,), (position,))
            self._ids_1[0] = tokens[-1]
            backbone.embed_ids(self._ids_1, out_TD=self._x_1D)
            backbone.step(self._x_1D, self._rows, kv, out_TD=self._h_1D)
            tokens.append(self._choose(self._h_1D, position + 1))
        sequence.commit(text_records(tokens[:-1]))
        return TurnTime(middle - start, time.perf_counter() - middle, tokens)

    def _choose(self, h_1D: Tensor, position: int) -> int:
        request = SampleRequest(_GREEDY, self.sequence.seed, position, self._allowed)
        rows = self._samples.fill([request])
        tokens, _ = self.model.backbone.sample(h_1D, rows, out_B=self._drawn)
        return int(tokens)
