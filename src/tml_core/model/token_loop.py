"""Tokens of several sequences, step after step in one call, as far as a table says what may follow.

Legend: B rows, R tokens a row and call, P phases, C control tokens, V vocabulary, W = ceil(V / 32).
"""

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core import _ext
from tml_core.errors import InvalidArgument
from tml_core.model.decoder import Decoder
from tml_core.model.kv_store import KvStore
from tml_core.ops._common import num_threads
from tml_core.ops.linear import PackedWeight

__all__ = ["ROW", "TokenLoop", "TokenTable", "TokensDrawn"]

# csrc/step/token_loop.h: TokenRow.
ROW: Final = np.dtype(
    [
        ("position", "<i8"),
        ("token", "<i8"),
        ("seed", "<i8"),
        ("slot", "<i4"),
        ("phase", "<i4"),
        ("num_text", "<i4"),
        ("room", "<i4"),
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("top_k", "<i4"),
        ("padding", "<i4"),
    ]
)


class TokenTable:
    """What may be drawn in each phase of an output, and which phase follows.

    ``masks_PW``: int32 bits of the ids (bit i of word w is id 32 w + i). ``controls``: the C ids
    that are not text. ``next_phase``: P rows of C + 1, after each control and, last, after text; -1
    where more than the table has to be asked. Raises InvalidArgument for anything else.
    """

    def __init__(
        self,
        masks_PW: Tensor,
        controls: tuple[int, ...],
        next_phase: tuple[tuple[int, ...], ...],
        vocab_size: int,
    ) -> None:
        self.handle: Final = _ext.TokenTable(
            masks_PW,
            torch.tensor(controls, dtype=torch.int64),
            torch.tensor(next_phase, dtype=torch.int32),
            vocab_size,
        )


class TokensDrawn(NamedTuple):
    """What a call drew: of each row its tokens and their log-probabilities, in order."""

    num_steps: int
    num_tokens: int
    rows: list[tuple[list[int], list[float]]]


class TokenLoop:
    """Embed, all layers and the draw for one token of each row, again and again, without Python.

    ``rows`` [B] of `ROW` are filled by the caller: ``token``, which stands at ``position``, is fed,
    the next one drawn after it, and so on: at most ``room`` tokens are fed, until ``num_text``
    texts are drawn or the table has no answer. The tokens and every bit are those of
    `Backbone.embed_ids`, `step` and `sample`, whatever else is in the call. Room must be reserved
    in the store for all that may be fed.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: tuple[Tensor, Tensor, float],
        head: PackedWeight,
        vocab_size: int,
        kv: KvStore,
        max_rows: int,
        max_run: int,
    ) -> None:
        if max_rows < 1 or max_run < 1:
            raise InvalidArgument(
                f"TokenLoop: max_rows and max_run must be at least 1, got {max_rows} and {max_run}"
            )
        self.max_run: Final = max_run
        words = torch.zeros(max_rows, ROW.itemsize // 8, dtype=torch.int64)
        self.rows: NDArray[Any] = words.numpy().view(ROW)[:, 0]
        tokens_BR = torch.zeros(max_rows, max_run, dtype=torch.int64)
        logprobs_BR = torch.zeros(max_rows, max_run)
        counts_B = torch.zeros(max_rows, dtype=torch.int32)
        self._tokens: NDArray[np.int64] = tokens_BR.numpy()
        self._logprobs: NDArray[np.float32] = logprobs_BR.numpy()
        self._counts: NDArray[np.int32] = counts_B.numpy()
        table_VD, norm_D, eps = embed
        self._loop = _ext.TokenLoop(
            decoder.handle,
            table_VD,
            norm_D,
            eps,
            head.data,
            vocab_size,
            kv.global_pages,
            kv.sliding_pages,
            kv.global_table,
            kv.sliding_table,
            kv.conv_rows,
            words,
            tokens_BR,
            logprobs_BR,
            counts_B,
        )

    def run(self, num_rows: int, table: TokenTable, limit_s: float) -> TokensDrawn:
        """Draw at least one token for each of the first ``num_rows`` rows; all stop after the first
        step that ends ``limit_s`` or more after the call began.

        Raises InvalidArgument, with nothing done, for a row that does not fit model and store.
        """
        num_steps, num_tokens = self._loop.run(num_rows, table.handle, limit_s, num_threads())
        counts = self._counts[:num_rows].tolist()
        tokens = self._tokens[:num_rows].tolist()
        logprobs = self._logprobs[:num_rows].tolist()
        rows = [
            (ids[:count], logs[:count])
            for ids, logs, count in zip(tokens, logprobs, counts, strict=True)
        ]
        return TokensDrawn(num_steps, num_tokens, rows)
