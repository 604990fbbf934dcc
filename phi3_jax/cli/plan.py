"""The command `phi3-jax plan`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.plan import Work, render, to_dict
from phi3_jax.plan import plan as make_plan
from phi3_jax.plan.absent import keep_to_the_compiler

app = typer.Typer()


@app.command()
def plan(
    model: Annotated[str, Option(help="A preset's name, or a directory with a config.json.")],
    topology: Annotated[str, Option(help="The chips: v5e:4x4, v6e:1x1, v5p:2x2x2, h100:8.")],
    task: Annotated[str, Option(help="finetune, prefill or decode.")] = "finetune",
    mesh: Annotated[
        str | None, Option(help="Such as fsdp=8,tensor=2; default: try the sensible ones and rank them.")
    ] = None,
    batch: Annotated[int, Option(min=1, help="Rows, over all chips.")] = 16,
    seq: Annotated[int, Option(min=1, help="Tokens a row; for decode, slots of the cache.")] = 4096,
    lora: Annotated[int | None, Option(min=1, help="Fine-tune adapters of this rank only.")] = None,
    remat: Annotated[
        str, Option(help="What backward computes again: full (layers), dots (all but products), none.")
    ] = "full",
    dtype: Annotated[str, Option(help="Of parameters and activations.")] = "bfloat16",
    cache_dtype: Annotated[str | None, Option(help="Of the cache, int8 too; default: --dtype.")] = None,
    optimizer_dtype: Annotated[str, Option(help="Of trained parameters and Adam's moments.")] = "float32",
    layers: Annotated[int | None, Option(min=1, help="With this many layers only.")] = None,
    compiled: Annotated[int, Option(min=1, help="Without --mesh: compile so many of the best.")] = 4,
    json_file: Annotated[
        str | None,
        Option("--json", help="Write the plan as JSON to this file; -: to standard output, no table."),
    ] = None,
) -> None:
    """Compile a step for TPUs that are not here: does it fit, what moves, how fast at most."""
    keep_to_the_compiler()
    config = model_config(model)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    work = Work(
        config,
        task,  # type: ignore[arg-type]  # Work refuses what is no task
        batch,
        seq,
        dtype=dtype,
        cache_dtype=cache_dtype,
        optimizer_dtype=optimizer_dtype,
        lora=lora,
        remat=remat,  # type: ignore[arg-type]
    )
    result = make_plan(work, topology, mesh, compiled=compiled)
    text = json.dumps({"model": model, **to_dict(result)}, indent=2)
    if json_file == "-":
        print(text)
        return
    if json_file is not None:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
    # Where it is not a terminal, no line is cut.
    render(result, Console(width=None if sys.stdout.isatty() else 160))


def model_config(model: str) -> Phi3Config:
    """Of a preset, or of a local checkpoint."""
    if Path(model).exists():
        return Phi3Config.from_pretrained(model)
    return Phi3Config.preset(model)
