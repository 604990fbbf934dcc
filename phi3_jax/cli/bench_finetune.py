"""The command `phi3-jax bench-finetune`: the settings of `phi3-jax finetune`, run in transformers too."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from phi3_jax.cli import options
from phi3_jax.cli.settings import read_settings, with_settings
from phi3_jax.errors import UserError
from phi3_jax.runs.files import check_outputs
from phi3_jax.train.bench import run_turns, run_whole

app = typer.Typer(add_completion=False)

REQUIRED = ("torch", "transformers")


def _bench_finetune(
    config: Annotated[
        Path | None, Argument(help="A YAML file of settings; default: the settings below.", **options.INPUT)
    ] = None,
    steps: Annotated[int, Option(min=1, help="The steps of a turn; all turns take the same batches.")] = 8,
    rounds: Annotated[int, Option(min=1, help="The turns of each side, in alternation.")] = 3,
    whole_run: Annotated[
        bool, Option("--whole-run", help="Train in transformers to the end and evaluate the result.")
    ] = False,
    output: Annotated[
        Path | None, Option(help="A JSON file for the metrics of --whole-run.", dir_okay=False)
    ] = None,
    cache_dir: options.CacheDir = None,
    **given: Any,
) -> None:
    """Measure training steps, side by side with transformers.

    Both sides run the same recipe. Nothing is saved, so settings of the output directory and of checkpoints
    have no effect.
    """
    settings = read_settings(config, given)
    required = [*REQUIRED, "peft"] if settings.trained == "lora" else REQUIRED
    if absent := [name for name in required if importlib.util.find_spec(name) is None]:
        raise UserError(f"the comparison needs {' and '.join(absent)}; pip install {' '.join(absent)}")
    if output is not None and not whole_run:
        raise UserError("--output is for the metrics of --whole-run; add --whole-run or omit --output")
    splits = (settings.train_file, settings.validation_file, settings.test_file)
    files = [
        file for each in splits if each is not None for file in ([each] if isinstance(each, str) else each)
    ]
    check_outputs(
        {"--output": output}, {"the settings": config} | {f"the data {file}": Path(file) for file in files}
    )
    if whole_run:
        run_whole(settings, output=output, cache_dir=cache_dir)
    else:
        run_turns(settings, steps=steps, rounds=rounds, cache_dir=cache_dir)


bench_finetune = app.command()(with_settings("bench_finetune", _bench_finetune))
