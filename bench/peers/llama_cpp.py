"""llama.cpp in this process (package xllamacpp) on the same tensors and bytes as shape S.

The server keeps the sequence in its slot; a turn is one completion request whose prompt goes on
from it, and the times are the server's own: its HTTP side does not count.
"""

import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch import Tensor

from peers.engine import NUM_DECODED, TurnTime, real_context
from peers.gguf_model import write_gguf, write_slot
from peers.huge_pages import anonymous_mappings, collapse
from shape_s import random_ids, weights

__all__ = ["LlamaCppEngine"]

_MAX_CONTEXT = 40_960


class LlamaCppEngine:
    """The one slot of a server. Its weights are read into memory, in huge pages where possible."""

    name = "llama.cpp"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        model = folder / "shape_s.gguf"
        write_gguf(model, weights())
        before = anonymous_mappings()
        self._server = xllamacpp.Server(_params(model, folder))
        collapse(anonymous_mappings() - before)
        model.unlink()
        self._template: bytes | None = None
        self._ids: list[int] = []

    @property
    def context_len(self) -> int:
        return len(self._ids)

    def grow(self, context_len: int) -> None:
        if ids := real_context(self.context_len, context_len).tolist():
            self._ids += ids
            self._complete(1)
        if (missing := context_len - self.context_len) > 0:
            self._ids += random_ids(missing, seed=self.context_len).tolist()
            self._fill()

    def turn(self, ids: Tensor) -> TurnTime:
        expected = self.context_len
        self._ids += ids.tolist()
        answer = self._complete(NUM_DECODED + 1)
        times = answer["timings"]
        got = (times["cache_n"], times["prompt_n"], times["predicted_n"])
        if got != (expected, len(ids), NUM_DECODED + 1):
            raise RuntimeError(
                f"llama.cpp: expected {expected} cached, {len(ids)} new and {NUM_DECODED + 1} "
                f"chosen tokens, got {got}"
            )
        # The last chosen token is not in the cache yet, as with the other engines.
        self._ids += answer["tokens"][:NUM_DECODED]
        # The server's clock for decoding starts when the first token has been chosen.
        return TurnTime(times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3, answer["tokens"])

    def close(self) -> None:
        """Stop the server and delete its files."""
        del self._server
        self._folder.cleanup()

    def _fill(self) -> None:
        folder = Path(self._folder.name)
        if self._template is None:
            self._post("/slots/0?action=save", {"filename": "template.bin"})
            self._template = (folder / "template.bin").read_bytes()
        write_slot(folder / "context.bin", self._template, self._ids)
        answer = self._post("/slots/0?action=restore", {"filename": "context.bin"})
        (folder / "context.bin").unlink()
        if answer["n_restored"] != self.context_len:
            raise RuntimeError(
                f"llama.cpp: {answer['n_restored']} of {self.context_len} positions restored"
            )

    def _complete(self, num_tokens: int) -> dict[str, Any]:
        return self._post(
            "/completion",
            {
                "prompt": self._ids,
                "n_predict": num_tokens,
                "samplers": ["top_k"],
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": True,
                "return_tokens": True,
                "id_slot": 0,
            },
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def _params(model: Path, folder: Path) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    # Its CPU flash attention takes eight times as long over 12 queries at 32k.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx = _MAX_CONTEXT
    params.n_parallel = 1
    params.n_batch = 2048
    params.n_ubatch = 512
    params.cpuparams.n_threads = torch.get_num_threads()
    params.cpuparams_batch.n_threads = torch.get_num_threads()
    # Nothing but the turn itself: no checkpoints of the sliding layers, no store of old prompts.
    params.n_ctx_checkpoints = 0
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.fit_params = False
    params.use_jinja = False
    params.ui = False
    params.verbosity = 1
    params.slot_save_path = f"{folder}/"
    return params
