"""``tml-core info``: this build, this machine, a model, and what a session of it takes."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tml_core import _ext
from tml_core.contract import CONTRACT_VERSION
from tml_core.errors import CheckpointError, InvalidArgument
from tml_core.media.micro_turns import TICK_MS
from tml_core.media.patches import num_patches
from tml_core.model.config import ModelConfig, bundled_path
from tml_core.model.kv_store import kv_sizes
from tml_core.model.weights import expected_shapes
from tml_core.ops._common import num_threads

__all__ = ["about"]

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TICKS_PER_MINUTE: Final = 60_000 // TICK_MS
_FRAMES_PER_TICK: Final = 4
_PICTURE: Final = (90, 159)  # 16:9 at the default size of media.micro_turns


def about(model: str, dtype: str) -> RenderableType:
    """Build, machine, model and memory as tables. Reads the model's config, not its weights.

    Raises CheckpointError or InvalidArgument for an unknown model or dtype.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype: expected one of {sorted(_DTYPES)}, got {dtype!r}")
    directory = bundled_path(model) if model == "nano" else Path(model)
    if not directory.is_dir():
        raise CheckpointError(f"model: expected 'nano' or a checkpoint directory, got {model!r}")
    config = ModelConfig.from_path(directory)
    return Group(
        *_section("build", _build()),
        *_section(f"model {model}", _model(config, _DTYPES[dtype])),
        *_section("memory of a session", _memory(config, _DTYPES[dtype])),
    )


def _section(title: str, facts: dict[str, str]) -> tuple[RenderableType, ...]:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="grey62", min_width=22)
    table.add_column()
    for name, value in facts.items():
        table.add_row(f"  {name}", value)
    return Text(title, style="bold"), table, Text()


def _build() -> dict[str, str]:
    levels = " ".join(_ext.supported_isas())
    return {
        "version": f"{version('tml_core')}, contract {CONTRACT_VERSION}",
        "cpu kernels": f"{_ext.isa()} (of {levels})",
        "cuda kernels": "built" if _ext.WITH_CUDA else "not built",
        "threads": f"{num_threads()}",
        "torch, python": f"{torch.__version__}, {platform.python_version()}",
    }


def _model(config: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    text = config.text
    count = sum(math.prod(shape) for shape in expected_shapes(config).values())
    num_sliding = sum(text.layer_is_sliding)
    experts = f"{text.top_k} of {text.num_experts} experts and {text.num_shared} shared"
    is_sparse = not all(text.layer_is_dense)
    layout = "chat template, answers on commit"
    if config.interaction is not None:
        most = config.interaction.max_text_per_tick
        layout = f"micro-turns of {TICK_MS} ms, at most {most} text tokens each"
    return {
        "weights": "trained" if config.is_trained else "untrained: a fixed random initialisation",
        "size": f"{_count(count)} parameters, {_bytes(count * dtype.itemsize)} in "
        f"{str(dtype).removeprefix('torch.')}",
        "decoder": f"{text.num_layers} layers of {text.hidden_size} "
        f"({num_sliding} sliding, window {text.window}; {text.num_layers - num_sliding} global)",
        "mlp": experts if is_sparse else "dense",
        "vocabulary": f"{text.unpadded_vocab_size} tokens",
        "takes": "text" if config.audio is None else "text, sound, pictures",
        "layout": layout,
    }


def _memory(config: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    sizes = kv_sizes(config.text, dtype)
    # Before the window is full the sliding layers grow too; after, only the global layers do.
    fixed = sizes.window_pages * sizes.sliding_page_bytes + sizes.conv_bytes
    facts = {"window and convolutions": _bytes(fixed)}
    per_tick = {"text only": 0}
    if config.audio is not None and config.vision is not None:
        picture = num_patches(*_PICTURE, config.vision.patch_size)
        per_tick = {"sound": _FRAMES_PER_TICK, "sound and 16:9 video": _FRAMES_PER_TICK + picture}
    # Beside what comes in: <|tick|>, <|out|> and <|silence|>.
    for name, num_positions in per_tick.items():
        per_minute = _TICKS_PER_MINUTE * (num_positions + 3)
        grown = per_minute * sizes.bytes_per_position
        facts[f"{name}, silent"] = f"{_bytes(grown)} a minute ({per_minute} positions)"
    facts["one more text token"] = _bytes(sizes.bytes_per_position)
    facts["longest"] = f"{config.text.max_positions} positions"
    return facts


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
