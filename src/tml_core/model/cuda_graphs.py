"""Steps of a Hopper GPU as CUDA graphs: what the host does for a step that comes again is one copy
of its embeddings, one of its batch, and one launch.

A graph belongs to how many sequences and tokens a step has; positions, slots and page tables are
read from the device (`StepUpload`), so one graph serves any of them.

Shape suffixes: T tokens of the step, D hidden size.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tml_core.model.cuda_store import DeviceStep

__all__ = ["Capture", "Captured", "StepGraphs", "capture_graphs"]

_MAX_TOKENS: Final = 64  # longer steps keep the device busy while the host launches
_MAX_GRAPHS: Final = 32
_SEEN_BEFORE: Final = 2  # a shape must have come so often before its capture pays


class Captured(NamedTuple):
    """A recorded step: ``replay()`` does it again, from and to the same memory; ``h_TD`` is its
    result."""

    replay: Callable[[], object]
    h_TD: Tensor


Capture = Callable[[Callable[[], Tensor]], Captured]
"""Records what a function launches, without running it."""


def capture_graphs(device: torch.device) -> Capture:
    """Records into CUDA graphs of one pool of memory; other threads may launch meanwhile."""
    pool: Any = None

    def capture(run: Callable[[], Tensor]) -> Captured:
        nonlocal pool
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            h_TD = run()
        pool = graph.pool()

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return Captured(replay, h_TD)

    return capture


class StepGraphs:
    """Replays steps of the shapes that come often, and runs the others.

    ``run``: the step itself, on tensors of the device; it must launch the same whenever it is given
    a batch of the same shape. The batch's tensors must stay where they are.
    """

    def __init__(
        self,
        run: Callable[[Tensor, DeviceStep], Tensor],
        capture: Capture,
        *,
        max_tokens: int = _MAX_TOKENS,
        max_graphs: int = _MAX_GRAPHS,
    ) -> None:
        self._run = run
        self._capture = capture
        self._max_tokens = max_tokens
        self._max_graphs = max_graphs
        self._x_TD: Tensor | None = None  # where graphs find their embeddings
        self._seen: dict[tuple[int, int], int] = {}
        self._graphs: OrderedDict[tuple[int, int], Captured] = OrderedDict()

    @property
    def num_graphs(self) -> int:
        """Shapes that are captured now."""
        return len(self._graphs)

    def step(self, x_TD: Tensor, batch: DeviceStep) -> Tensor:
        """h [T, D], which the next step leaves as it is; x_TD is used up."""
        num_tokens = x_TD.shape[0]
        if num_tokens > self._max_tokens:
            return self._run(x_TD, batch)
        shape = batch.slots.shape[0], num_tokens
        graph = self._graphs.get(shape)
        if graph is None:
            seen = self._seen.get(shape, 0)
            if seen < _SEEN_BEFORE:
                self._seen[shape] = seen + 1
                return self._run(x_TD, batch)
            graph = self._record(shape, batch, x_TD)
        else:
            self._graphs.move_to_end(shape)
        self._place(x_TD).copy_(x_TD)
        graph.replay()
        return graph.h_TD.clone()

    def _record(self, shape: tuple[int, int], batch: DeviceStep, x_TD: Tensor) -> Captured:
        if len(self._graphs) == self._max_graphs:
            oldest, _ = self._graphs.popitem(last=False)
            self._seen[oldest] = 0
        place_TD = self._place(x_TD)
        graph = self._capture(lambda: self._run(place_TD, batch))
        self._graphs[shape] = graph
        return graph

    def _place(self, x_TD: Tensor) -> Tensor:
        if self._x_TD is None:
            self._x_TD = x_TD.new_zeros(self._max_tokens, x_TD.shape[1])
        return self._x_TD[: x_TD.shape[0]]
