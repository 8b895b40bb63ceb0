"""The command line: ``tml-core run``, ``info``, ``train``, ``data``, ``align``, ``load``, ``eval``.

What goes wrong on purpose is one line on stderr and exit code 2, never a traceback.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tml_core.cli.data import app as data_app
from tml_core.errors import TmlError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="An open runtime for interaction models: 200 ms micro-turns on one persistent sequence.",
)

app.add_typer(data_app, name="data")

_Model = Annotated[str, typer.Option(help="nano (bundled, untrained) or a checkpoint directory.")]
_Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]


@app.command()
def run(
    audio: Annotated[Path | None, typer.Option(help="Sound: any audio file.")] = None,
    video: Annotated[Path | None, typer.Option(help="Pictures: any video file.")] = None,
    model: _Model = "nano",
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Feed 200 ms every 200 ms, as a microphone would.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is sampled.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely up to p; 1: all.")] = 1.0,
    max_ticks: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many micro-turns.")
    ] = None,
    typed: Annotated[
        list[str] | None,
        typer.Option("--type", help="SECONDS:TEXT, what the user types then; again for more."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions before the first tick.")] = None,
    dtype: _Dtype = "bfloat16",
    transcript: Annotated[
        Path | None, typer.Option(help="Write what happened to this file, as JSON lines.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write what a model that speaks says to this sound file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the session to this PNG: what came in, out, when.")
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(help="A second model for jobs: local (a llama.cpp server) or a URL."),
    ] = None,
    background_model: Annotated[
        str | None, typer.Option(help="Its name, where --background is a URL.")
    ] = None,
    delegate: Annotated[
        str | None, typer.Option(help="A job to start with, as if the model had asked for it.")
    ] = None,
) -> None:
    """Run a live session on a recording and show it tick by tick.

    Without --audio and --video the bundled 16 s clip is fed.
    """
    # Imported here: --help needs no kernels.
    from tml_core.cli.live import RunOptions, run_live
    from tml_core.engine.sampler import SamplingParams

    run_live(
        RunOptions(
            model=model,
            audio=audio,
            video=video,
            is_realtime=realtime,
            seed=seed,
            sampling=SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p),
            max_ticks=max_ticks,
            typed=tuple(typed or ()),
            dtype=dtype,
            system=system,
            transcript=transcript,
            out=out,
            plot=plot,
            background=background,
            background_model=background_model,
            delegate=delegate,
        ),
        Console(),
    )


@app.command()
def info(model: _Model = "nano", dtype: _Dtype = "bfloat16") -> None:
    """Show this build, the machine, a model's sizes and the memory a session takes."""
    from tml_core.cli.about import about

    Console(highlight=False).print(about(model, dtype))


@app.command()
def train(config: Annotated[Path, typer.Argument(help="A run, as TOML.")]) -> None:
    """Train a model, or go on where the run's folder ends.

    Ctrl-C ends it after the step, with a checkpoint; what was killed resumes with the same bits.
    """
    from tml_core.cli.train import run_train

    run_train(config, Console(highlight=False))


@app.command("make")
def make_model(
    name: Annotated[str, typer.Argument(help="A recipe: nano.")],
    out: Annotated[Path, typer.Argument(help="A folder, new or of an interrupted run.")],
    scale: Annotated[float, typer.Option(help="So many times the recipe's data.")] = 1.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make data.")] = 2,
    cache: Annotated[Path | None, typer.Option(help="Where to keep what engines say.")] = None,
) -> None:
    """Make a bundled model from nothing: data, training, weights; goes on where it stopped.

    OUT/recipe.toml may be edited before it goes on.
    """
    from tml_core.cli.make import run_make

    run_make(name, out, scale, workers, cache, Console(highlight=False))


@app.command()
def align(
    model: _Model = "nano",
    tokens: Annotated[int, typer.Option(min=1, help="Drawn tokens to compare, per dtype.")] = 2000,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or both.")] = "both",
    steps: Annotated[
        int, typer.Option(min=0, help="Optimizer steps, after which to compare again.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
) -> None:
    """Sample sessions, recompute each drawn token in the trainer, and compare the bits.

    Exit code 1 if any token's log-probability differs.
    """
    from tml_core.cli.align import run_align

    if not run_align(model, tokens, dtype, steps, seed, Console(highlight=False)):
        raise typer.Exit(1)


@app.command()
def load(
    sessions: Annotated[int, typer.Option(min=1, help="How many clients.")] = 4,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, help="Find how many sessions fit, from --sessions up to so many."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the measured window.")] = 20.0,
    warmup: Annotated[float, typer.Option(help="Seconds of the same load before it.")] = 2.0,
    model: _Model = "nano",
    dtype: _Dtype = "bfloat16",
    video: Annotated[bool, typer.Option(help="Feed pictures beside the sound.")] = True,
    phase: Annotated[
        str, typer.Option(help="How the clients' clocks lie: random, spread or aligned.")
    ] = "random",
    jitter_ms: Annotated[float, typer.Option(help="Chunks come up to that much late.")] = 0.0,
    stalls: Annotated[float, typer.Option(help="Network stalls per client and minute.")] = 0.0,
    disconnects: Annotated[
        float, typer.Option(help="Clients that vanish in a turn, per client and minute.")
    ] = 0.0,
    barge_ins: Annotated[float, typer.Option(help="Turns cancelled per client and minute.")] = 0.0,
    deadline_ms: Annotated[float, typer.Option(help="A later answer is a miss.")] = 200.0,
    degrade: Annotated[
        str,
        typer.Option(help="none, emit_silence, shrink_output or coalesce_input."),
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the clients and of what is sampled.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG (needs the extra 'plot').")] = None,
) -> None:
    """Load an engine with paced sessions and report latency, misses and capacity.

    Each client feeds the bundled recording, 200 ms every 200 ms, whether it is answered or not.
    """
    from tml_core.cli.load import LoadOptions, run_load_command
    from tml_core.load.plan import LoadSpec, as_degrade, as_phase

    spec = LoadSpec(
        num_sessions=sessions,
        duration_s=seconds,
        warmup_s=warmup,
        phase=as_phase(phase),
        jitter_ms=jitter_ms,
        stalls=stalls,
        disconnects=disconnects,
        barge_ins=barge_ins,
        deadline_ms=deadline_ms,
        degrade=as_degrade(degrade),
        seed=seed,
    )
    options = LoadOptions(spec, model, dtype, video, capacity, json, plot)
    run_load_command(options, Console(highlight=False))


@app.command(name="eval")
def evaluate(
    suites: Annotated[
        list[str] | None, typer.Argument(help="Suites by name, or all.", show_default="all")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="nano or a checkpoint directory; again for another beside it."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Interactions of each task.")] = 100,
    split: Annotated[
        str, typer.Option(help="held_out to measure; train, with another seed, to choose by.")
    ] = "held_out",
    typed: Annotated[float, typer.Option(help="Share of requests that are typed.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the interactions.")] = 0,
    baselines: Annotated[
        str, typer.Option(help="silent, cascade, no-clock, with commas between; all or none.")
    ] = "silent",
    sessions: Annotated[int, typer.Option(min=1, help="Played at a time.")] = 16,
    dtype: _Dtype = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="A folder for the results.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """Measure what a model does in time: suites of interactions it has never met.

    Most likely tokens, live sessions, as fast as the machine goes.
    """
    from tml_core.cli.eval import BASELINES, EvalOptions, as_split, run_eval

    every = {"all": tuple(BASELINES), "none": ()}
    names = every.get(baselines, tuple(one for one in baselines.split(",") if one))
    options = EvalOptions(
        suites=tuple(suites or ["all"]),
        models=tuple(model or ["nano"]),
        num_items=items,
        seed=seed,
        split=as_split(split),
        typed=typed,
        baselines=names,
        num_sessions=sessions,
        dtype=dtype,
        out=out,
        is_markdown=markdown,
    )
    run_eval(options, Console(highlight=False))


def main() -> None:
    """The ``tml-core`` command."""
    try:
        app()
    except (TmlError, OSError) as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"tml-core: error: {line}\n")
        sys.exit(2)
