"""`phi3-jax finetune`: a YAML file and, before it, options of the same names."""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_jax.cli import common, options
from phi3_jax.cli.settings import read_settings, with_settings
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.train.finetune import InterruptedRunError
from phi3_jax.train.finetune import finetune as run_finetune

app = typer.Typer()


def _finetune(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings; default: those below.", dir_okay=False)
    ] = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
    **given: Any,
) -> None:
    """Train a classifier, a tagger or a language model; go on where the same command was cut off.

    Without a file of rows it learns generated commands, as a demonstration.
    """
    settings = read_settings(config, given)
    where = prepare(mesh, distributed, preemption=True)
    common.keep_compiled_programs(cache_dir)
    try:
        results = run_finetune(settings, mesh=where, cache_dir=cache_dir)
    except InterruptedRunError as error:
        tell(f"phi3-jax: {error}")
        raise typer.Exit(128 + signal.Signals(error.signal)) from None
    for split, metrics in results.items():
        print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(
        f"{settings.output_dir}: model, tokenizer, report.md, metrics.json, curves.png, log.jsonl, "
        "tensorboard"
    )


finetune = app.command()(with_settings("finetune", _finetune))
