"""The command `phi3-jax finetune`, whose options override the settings of a YAML file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_jax.cli import options
from phi3_jax.cli.settings import read_settings, with_settings
from phi3_jax.errors import UserError
from phi3_jax.train.program import check_settings, run_settings

app = typer.Typer(add_completion=False)


def _finetune(
    config: Annotated[
        Path | None,
        typer.Argument(help="A YAML file of settings; default: the settings below.", **options.INPUT),
    ] = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check settings, model, data, mesh and output directory, print what the run would do, and "
            "end; nothing is trained or written, and no accelerator is used.",
        ),
    ] = False,
    topology: Annotated[
        str | None,
        typer.Option(
            help="For --dry-run: the chips of the run, such as v5e:4x4 or h100:8; also checks that they have "
            "the memory."
        ),
    ] = None,
    **given: Any,
) -> None:
    """Train a classifier, a tagger or a language model.

    The same command resumes an interrupted run. Without a file of rows it trains on generated commands, as a
    demonstration.
    """
    settings = read_settings(config, given)
    where: Any = {"mesh": mesh, "distributed": distributed, "cache_dir": cache_dir}
    if dry_run:
        check_settings(settings, topology=topology, **where)
        return
    if topology is not None:
        raise UserError(f"--topology {topology} is for --dry-run; a run uses the devices that are there")
    run_settings(settings, **where)


finetune = app.command()(with_settings("finetune", _finetune))
