"""The command `phi3-jax finetune`, whose options override the settings of a YAML file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_jax.cli import options
from phi3_jax.cli.settings import read_settings, with_settings
from phi3_jax.train.program import run_settings

app = typer.Typer(add_completion=False)


def _finetune(
    config: Annotated[
        Path | None,
        typer.Argument(help="A YAML file of settings; default: the settings below.", **options.INPUT),
    ] = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
    **given: Any,
) -> None:
    """Train a classifier, a tagger or a language model.

    The same command resumes an interrupted run. Without a file of rows it trains on generated commands, as a
    demonstration.
    """
    run_settings(read_settings(config, given), mesh=mesh, distributed=distributed, cache_dir=cache_dir)


finetune = app.command()(with_settings("finetune", _finetune))
