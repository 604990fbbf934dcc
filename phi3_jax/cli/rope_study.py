"""The command `phi3-jax rope study`."""

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from phi3_jax.cli import common, options
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.rope_lab.study.findings import findings
from phi3_jax.rope_lab.study.run import run_study
from phi3_jax.rope_lab.study.settings import StudySettings
from phi3_jax.train.finetune import InterruptedRunError

app = typer.Typer(add_completion=False)


@app.command()
def study(
    config: Annotated[Path, Argument(help="A YAML file of settings.", **options.INPUT)],
    beside: Annotated[
        list[str] | None,
        Option(help="The directory of a finished study to show beside this one; may be repeated."),
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Start stages over that were started with other settings.")
    ] = False,
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Train and measure a model under each rope, and check the papers' findings.

    The output is report.md, results.json and figures, and a folder for each model and measurement. The same
    command resumes an interrupted study.
    """
    settings = StudySettings.read(config)
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    try:
        results = run_study(
            settings, beside=beside or (), overwrite=overwrite, mesh=where, cache_dir=cache_dir
        )
    except InterruptedRunError as error:
        tell(f"phi3-jax: {error}")
        raise SystemExit(128 + signal.Signals(error.signal)) from None
    shown = Table("claim", "here", "perplexities", box=SIMPLE)
    for each in findings(results):
        shown.add_row(each.claim, each.verdict, each.numbers)
    Console().print(shown)
    print(f"{settings.output_dir}: report.md, results.json, figures; a folder for each model and measurement")
