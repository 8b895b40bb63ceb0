"""AdamW and Muon of torch over a model's parameters, with steps that give the same bits again.

Everything here is elementwise, a product of one matrix, or a sum in a fixed order: the bits do not
depend on the number of threads (docs/determinism.md).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from tml_core.errors import CheckpointError
from tml_core.train.config import OptimizerConfig

__all__ = ["Optimizer", "clip_gradients", "gradient_norm"]

_ROW: Final = 8192  # elements summed by one kernel call, in an order that is the row's alone

# Inside the layers, but no matrix that maps one hidden state to another: the router decides, the
# bias bank is a table.
_NOT_MUON: Final = ("mlp.gate.weight", "rel_logits_proj.proj", "conv1d.weight")


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """The 2-norm of all elements together: rows of a fixed length, then an exactly rounded sum."""
    parts: list[float] = []
    for gradient in gradients:
        flat = gradient.detach().reshape(-1)
        whole = len(flat) // _ROW * _ROW
        for rows in (flat[:whole].view(-1, _ROW), flat[None, whole:]):
            norms = torch.linalg.vector_norm(rows, dim=1).double()
            parts += (norms * norms).tolist()
    if not all(map(math.isfinite, parts)):
        return math.nan
    return math.sqrt(math.fsum(parts))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale the gradients down to ``max_norm`` together (0: leave them); returns the norm before.

    The norm is NaN if any element is not finite; then nothing is scaled.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    norm = gradient_norm(gradients)
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


class Optimizer:
    """One step for all parameters of a model; its state by name, to store and restore.

    ``parameters``: by canonical name, float32. With ``kind = "muon"`` each matrix of a layer is
    stepped by `torch.optim.Muon`, experts one by one and gate and up rows apart; all else, and
    everything for "adamw", by fused `torch.optim.AdamW`. Vectors, scales and short convolutions
    have no weight decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        use_muon = config.kind == "muon"
        self._names: dict[Tensor, str] = {}
        self._views: list[tuple[nn.Parameter, nn.Parameter, tuple[int | slice, ...]]] = []
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in parameters.items():
            if use_muon and _is_hidden_matrix(name, parameter):
                for key in _matrices(name, parameter):
                    view = nn.Parameter(parameter.detach()[key])
                    self._views.append((view, parameter, key))
                    self._names[view] = f"{name}[{_spelled(key)}]"
                continue
            self._names[parameter] = name
            is_decayed = parameter.ndim >= 2 and not name.endswith("conv1d.weight")
            (decayed if is_decayed else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=True,
            )
        ]
        if self._views:
            self._optimizers.append(
                torch.optim.Muon(
                    [view for view, _, _ in self._views],
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, rate: float) -> None:
        """Apply the gradients with this learning rate; those of views are the parameters' own."""
        for view, parameter, key in self._views:
            view.grad = None if parameter.grad is None else parameter.grad[key]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        for view, _, _ in self._views:
            view.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor a later step depends on, by name."""
        return {
            f"{self._names[parameter]}.{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Raises CheckpointError naming a tensor that does not fit."""
        owners = {
            name: (parameter, optimizer)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            for name in [self._names[parameter]]
        }
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in owners:
                raise CheckpointError(f"optimizer: {full_name} is of no parameter of this model")
            parameter, optimizer = owners[name]
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimizer: {full_name} must be {list(parameter.shape)}, "
                    f"got {list(value.shape)}"
                )
            optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    is_inside = ".layers." in name or ".encoder_layers." in name
    return is_inside and parameter.ndim >= 2 and not name.endswith(_NOT_MUON)


def _matrices(name: str, parameter: Tensor) -> list[tuple[int | slice, ...]]:
    """Where the matrices of a parameter lie: [N, K], or [E, N, K] with gate and up rows joined."""
    if parameter.ndim == 2:
        return [(slice(None),)]
    if not name.endswith("gate_up_proj"):
        return [(expert,) for expert in range(len(parameter))]
    half = parameter.shape[1] // 2
    parts = (slice(0, half), slice(half, 2 * half))
    return [(expert, part) for expert in range(len(parameter)) for part in parts]


def _spelled(key: tuple[int | slice, ...]) -> str:
    return ",".join(str(one) if isinstance(one, int) else f"{one.start or 0}:" for one in key)
