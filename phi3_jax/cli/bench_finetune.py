"""`phi3-jax bench-finetune`: the settings of `phi3-jax finetune`, run in transformers too."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from phi3_jax.cli import options
from phi3_jax.cli.settings import read_settings, with_settings
from phi3_jax.errors import UserError
from phi3_jax.train.bench import run_turns, run_whole

app = typer.Typer()

THEIRS = ("torch", "transformers")


def _bench_finetune(
    config: Annotated[
        Path | None, Argument(help="A YAML file of settings; default: those below.", dir_okay=False)
    ] = None,
    steps: Annotated[int, Option(min=1, help="Of a turn, each over the same batches.")] = 8,
    rounds: Annotated[int, Option(min=1, help="Turns of each, one after the other.")] = 3,
    whole_run: Annotated[
        bool, Option("--whole-run", help="Train in transformers to the end, and score what comes of it.")
    ] = False,
    output: Annotated[
        Path | None, Option(help="Of --whole-run: write the metrics to this file, as JSON.", dir_okay=False)
    ] = None,
    cache_dir: options.CacheDir = None,
    **given: Any,
) -> None:
    """Measure training steps side by side with transformers', on the same recipe; or train all of it there.

    Nothing is kept: settings of the run's directory and its checkpoints do nothing here.
    """
    settings = read_settings(config, given)
    needed = [*THEIRS, "peft"] if settings.trained == "lora" else THEIRS
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"this compares with {' and '.join(absent)}; pip install {' '.join(absent)}")
    if output is not None and not whole_run:
        raise UserError("--output is for the metrics of --whole-run; add that, or leave --output out")
    if whole_run:
        run_whole(settings, output=output, cache_dir=cache_dir)
    else:
        run_turns(settings, steps=steps, rounds=rounds, cache_dir=cache_dir)


bench_finetune = app.command()(with_settings("bench_finetune", _bench_finetune))
