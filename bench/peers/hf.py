"""transformers' InklingForCausalLM, on shape S with the same weights in the same memory.

The fastest settings it has on a CPU: sdpa attention, grouped_mm experts, inference mode, logits of
the last position only. The cache is the DynamicCache its config asks for.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, InklingForCausalLM
from transformers.models.inkling.configuration_inkling import InklingTextConfig
from transformers.utils import logging as hf_logging

from peers.engine import TurnTime, real_context, timed_turn
from shape_s import TEXT_CONFIG, weights

__all__ = ["HfEngine"]

_CHUNK = 512

hf_logging.set_verbosity_error()


class HfEngine:
    """One sequence of transformers."""

    name = "transformers"

    def __init__(
        self,
        text_config: dict[str, Any] | None = None,
        model_weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Shape S in bf16, or a model of another config with weights under canonical names."""
        self._config = config = InklingTextConfig(**(text_config or TEXT_CONFIG))
        with torch.device("meta"):
            model = InklingForCausalLM._from_config(
                config,
                attn_implementation="sdpa",
                experts_implementation="grouped_mm",
                dtype=dtype,
            )
        state = {
            name.replace("model.language_model.", "model."): value
            for name, value in (model_weights or weights()).items()
        }
        model.load_state_dict(state, assign=True)
        self._model = model.eval()
        self.restart()

    def restart(self) -> None:
        """Start over with an empty context."""
        self._cache = DynamicCache(config=self._config)

    @property
    def context_len(self) -> int:
        return int(self._cache.get_seq_length())

    def grow(self, context_len: int) -> None:
        for ids in real_context(self.context_len, context_len).split(_CHUNK):
            if len(ids):
                self._run(ids)
        if (missing := context_len - self.context_len) > 0:
            generator = torch.Generator().manual_seed(2)
            shape = (1, 4, missing, 64)
            for layer in range(self._config.num_hidden_layers):
                k = torch.randn(shape, generator=generator).bfloat16()
                v = torch.randn(shape, generator=generator).bfloat16()
                self._cache.update(k, v, layer)

    def turn(self, ids: Tensor) -> TurnTime:
        return timed_turn(ids, self._step)

    def logits(self, ids: Tensor) -> Tensor:
        """Append ids; the last position's logits, float32 [V]."""
        return self._run(ids)[0, -1].float()

    def turn_with_hits(self, ids: Tensor) -> list[float]:
        """A micro-turn; for each of its nine steps the distinct experts hit, mean over layers."""
        hits: list[int] = []

        def count(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> None:
            hits.append(output[2].unique().numel())

        gates = [layer.mlp.gate for layer in self._model.model.layers]
        hooks = [gate.register_forward_hook(count) for gate in gates]
        try:
            self.turn(ids)
        finally:
            for hook in hooks:
                hook.remove()
        num_layers = len(gates)
        return [sum(hits[i : i + num_layers]) / num_layers for i in range(0, len(hits), num_layers)]

    def _step(self, ids: Tensor) -> Tensor:
        return self._run(ids)[0, -1:].argmax(dim=-1)

    def _run(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            output = self._model(
                input_ids=ids[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits
