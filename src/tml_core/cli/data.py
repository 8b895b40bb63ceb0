"""``tml-core data``: ``build`` makes a dataset, with a bar of how far it is; ``show`` draws one."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["app", "show_voices"]

app = typer.Typer(no_args_is_help=True, help="Scripted interactions with exact labels.")


def show_voices(console: Console, engines: Sequence[str] | None) -> None:
    """Whose voices data will have, and why no others."""
    from tml_core.data import SpeechBank

    with SpeechBank(engines) as bank:
        console.print(f"voices of {', '.join(bank.engines)}")
        for reason in bank.left_out:
            console.print(f"left out: {reason}", soft_wrap=True)


@app.command("build")
def build_command(
    out: Annotated[Path, typer.Argument(help="A folder, new or of an interrupted build.")],
    hours: Annotated[float | None, typer.Option(help="At least so many hours.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Or so many interactions.")] = None,
    split: Annotated[str, typer.Option(help="train or held_out.")] = "train",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    model: Annotated[
        str, typer.Option(help="nano or a directory: its config and tokenizer.")
    ] = "nano",
    tasks: Annotated[str | None, typer.Option(help="Names with commas; all by default.")] = None,
    typed: Annotated[float, typer.Option(help="Share of requests that are typed.")] = 0.0,
    engines: Annotated[
        str | None, typer.Option(help="Speech engines with commas; all that are here by default.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where to keep what engines say.")] = None,
) -> None:
    """Make a dataset for `tml-core train`, or go on with one that was interrupted."""
    from tml_core.data import build
    from tml_core.data.bank import as_split

    console = Console(highlight=False)
    names = None if engines is None else engines.split(",")
    show_voices(console, names)
    bar = Progress(
        TextColumn("data"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[hours]:.2f} h"),
        TextColumn("{task.fields[speed]:.0f} x real time"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    start: list[tuple[float, float]] = []  # time and seconds of data when the first shard was there
    with bar:
        task = bar.add_task("data", total=1.0, hours=0.0, speed=0.0)

        def show(share: float, seconds: float) -> None:
            if not start:
                start.append((time.monotonic(), seconds))
            passed = time.monotonic() - start[0][0]
            speed = (seconds - start[0][1]) / passed if passed > 0.5 else 0.0
            bar.update(task, completed=share, hours=seconds / 3600.0, speed=speed)

        report = build(
            out,
            model,
            seed=seed,
            split=as_split(split),
            num=num,
            hours=hours,
            workers=workers,
            tasks=None if tasks is None else tasks.split(","),
            typed=typed,
            engines=names,
            cache=cache,
            progress=show,
        )
    console.print(
        f"{report.num_interactions} interactions, {report.seconds / 3600:.2f} h, "
        f"{report.num_bytes / 1e6:.1f} MB; {report.num_made} made now: {out}",
        soft_wrap=True,
    )


@app.command("show")
def show_command(
    out: Annotated[Path, typer.Argument(help="A PNG to write.")],
    index: Annotated[int, typer.Option(min=0, help="Of the interaction.")] = 0,
    task: Annotated[str | None, typer.Option(help="Only of this task; all by default.")] = None,
    split: Annotated[str, typer.Option(help="train or held_out.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
) -> None:
    """Draw one interaction: sound, pictures, words, and what is due when."""
    from tml_core.data import SpeechBank, cache_folder, interaction
    from tml_core.data.bank import as_split
    from tml_core.data.sheet import draw_sheet

    with SpeechBank(cache=cache_folder()) as bank:
        tasks = None if task is None else [task]
        one = interaction(seed, index, as_split(split), bank=bank, tasks=tasks)
    draw_sheet(one, out)
    console = Console(highlight=False)
    console.print(f"{one.script.num_ticks * 0.2:.1f} s, {len(one.script.expected)} due: {out}")
