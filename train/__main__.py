"""`python -m phi3_jax.train CONFIG.yaml`: the same run as `phi3-jax finetune CONFIG.yaml`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from phi3_jax.parallel.messages import run_program, show_log

from .program import run_settings
from .settings import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, Argument(help="A YAML file of settings.", dir_okay=False)],
    mesh: Annotated[str | None, Option(help="Divide the model over all devices, as in fsdp=16.")] = None,
    distributed: Annotated[
        bool, Option("--distributed", help="This is one of several processes with the same command.")
    ] = False,
) -> None:
    """Train a classifier, a tagger or a language model; the same command resumes an interrupted run."""
    show_log()
    run_settings(Settings.read(config, {}), mesh=mesh, distributed=distributed, cache_dir=None)


if __name__ == "__main__":
    run_program(app)
