"""Our engine on shape S: the model, one sequence, greedy sampling, as a session drives them."""

import math
import time
from functools import cache

import torch
from torch import Tensor

from peers.engine import NUM_DECODED, TurnTime, real_context
from shape_s import TEXT_CONFIG, config, random_ids, weights
from tml_core.contract import PAGE_LEN
from tml_core.engine.model import Model
from tml_core.engine.sampler import RowBuffers, SampleRequest, SamplingParams, signed
from tml_core.media.segments import Tokens
from tml_core.model.backbone import Backbone
from tml_core.model.config import ModelConfig
from tml_core.model.kv_store import KvStore
from tml_core.model.token_loop import TokenTable
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
    the tokens in one call, which enter the sequence together."""

    name = "tml_core"

    def __init__(self, model: Model, sequence: Sequence | None = None) -> None:
        self.model = model
        self.sequence = model.new_sequence() if sequence is None else sequence
        self._allowed = pack_allowed(torch.ones(1, model.vocab_size, dtype=torch.bool))[0]
        self._samples = RowBuffers(1, len(self._allowed))
        self._drawn = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        backbone = model.backbone
        assert isinstance(backbone, Backbone)  # not the one of a GPU
        self._loop = backbone.token_loop(model.store.kv, 1, NUM_DECODED)
        self._table = TokenTable(self._allowed[None], (), ((0,),), model.vocab_size)

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
        sequence = self.sequence
        start = time.perf_counter()
        (h_TD,) = self.model.runner.run([self.model.prepare(sequence, [Tokens(ids)])])
        tokens = [self._choose(h_TD[-1:], sequence.tip)]
        middle = time.perf_counter()
        tip, slot = sequence.tip, sequence.slot.index
        sequence.reserve(NUM_DECODED)
        greedy = 0.0, 1.0, 0, 0
        self._loop.rows[0] = (
            *(tip, tokens[0], signed(sequence.seed), slot, 0, NUM_DECODED + 1, NUM_DECODED),
            *greedy,
        )
        ((drawn, _),) = self._loop.run(1, self._table, math.inf).rows
        tokens += drawn
        sequence.commit(text_records(tokens[:-1]))
        return TurnTime(middle - start, time.perf_counter() - middle, tokens)

    def _choose(self, h_1D: Tensor, position: int) -> int:
        request = SampleRequest(_GREEDY, self.sequence.seed, position, self._allowed)
        rows = self._samples.fill([request])
        tokens, _ = self.model.backbone.sample(h_1D, rows, out_B=self._drawn)
        return int(tokens)
