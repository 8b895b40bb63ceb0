"""``tml-core align``: the comparison of sampler and trainer, with its progress and a table."""

from collections.abc import Callable
from typing import Final

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tml_core.errors import InvalidArgument
from tml_core.train.align import AlignReport, align

__all__ = ["run_align"]

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def run_align(
    model: str, num_tokens: int, dtype: str, num_steps: int, seed: int, console: Console
) -> bool:
    """Compare and show; whether every bit agreed.

    ``dtype``: "bfloat16", "float32" or "both". Raises InvalidArgument for another one, and what
    `align` raises.
    """
    if dtype not in (*_DTYPES, "both"):
        raise InvalidArgument(f"dtype: expected bfloat16, float32 or both, got {dtype!r}")
    reports: list[AlignReport] = []
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        for name in _DTYPES if dtype == "both" else (dtype,):
            reports += align(
                model,
                num_tokens=num_tokens,
                dtype=_DTYPES[name],
                num_steps=num_steps,
                seed=seed,
                progress=_stages(bar),
            )
    console.print(_table(reports))
    is_aligned = all(one.is_aligned for one in reports)
    console.print("sampler and trainer agree, bit for bit" if is_aligned else "they differ")
    return is_aligned


def _stages(bar: Progress) -> Callable[[str, int, int], None]:
    """A bar for each stage, put up when it begins."""
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage)
        bar.update(tasks[stage], completed=done, total=total)

    return show


def _table(reports: list[AlignReport]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    has_sound = any(one.num_blocks for one in reports)
    for header in (
        "dtype",
        "steps",
        "sessions",
        "positions",
        "tokens",
        "differ",
        "largest",
        *(("blocks", "differ") if has_sound else ()),
        "sampled",
        "computed",
    ):
        table.add_column(header, justify="left" if header == "dtype" else "right")
    for one in reports:
        table.add_row(
            one.dtype,
            str(one.num_steps),
            str(one.num_transcripts),
            str(one.num_positions),
            str(one.num_tokens),
            str(one.num_differing),
            f"{one.largest_difference:.3g}",
            *((str(one.num_blocks), str(one.num_differing_blocks)) if has_sound else ()),
            f"{one.sample_s:.1f} s",
            f"{one.recompute_s:.1f} s",
        )
    return table
