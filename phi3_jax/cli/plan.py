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
from phi3_jax.plan.remat import AUTO
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.urls import is_url

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    model: Annotated[str, Option(help="A preset's name, or a directory with a config.json.")],
    topology: Annotated[str, Option(help="The chips, such as v5e:4x4, v6e:1x1, v5p:2x2x2 or h100:8.")],
    task: Annotated[str, Option(help="finetune, prefill or decode.")] = "finetune",
    mesh: Annotated[
        str | None, Option(help="A mesh such as fsdp=8,tensor=2; default: rank all sensible ones.")
    ] = None,
    batch: Annotated[int, Option(min=1, help="The rows of the batch, over all chips.")] = 16,
    seq: Annotated[
        int, Option(min=1, help="The tokens of a row; for decode, the slots of the cache.")
    ] = 4096,
    lora: Annotated[int | None, Option(min=1, help="Fine-tune only adapters of this rank.")] = None,
    remat: Annotated[
        str,
        Option(
            help="What the backward pass computes again, from whole layers to nothing: full, "
            "attention_dots, attention, dots, dots_and_attention or none; auto: as little as memory allows."
        ),
    ] = AUTO,
    dtype: Annotated[str, Option(help="The dtype of parameters and activations.")] = "bfloat16",
    quantize: Annotated[
        str | None,
        Option(help="Weights as int8, int4, int4:group_size=128 or int8:activations=int8; default: floats."),
    ] = None,
    cache_dtype: Annotated[
        str | None, Option(help="The dtype of the cache, which may be int8; default: --dtype.")
    ] = None,
    optimizer_dtype: Annotated[
        str, Option(help="The dtype of trained parameters and Adam's moments.")
    ] = "float32",
    layers: Annotated[int | None, Option(min=1, help="Use only this many layers.")] = None,
    compiled: Annotated[int, Option(min=1, help="Without --mesh, compile this many of the best meshes.")] = 4,
    json_file: Annotated[
        str | None,
        Option("--json", help="A JSON file for the plan, or its URL; -: standard output, without tables."),
    ] = None,
) -> None:
    """Compile a step for absent TPUs: does it fit, what moves, how fast at most?

    GPUs are planned from shapes alone.
    """
    keep_to_the_compiler()
    config = model_config(model)
    check_outputs(
        {"--json": None if json_file == "-" else json_file},
        {"--model": Path(model) if Path(model).exists() else None},
    )
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    work = Work(
        config,
        task,  # type: ignore[arg-type]  # Work checks it
        batch,
        seq,
        dtype=dtype,
        cache_dtype=cache_dtype,
        optimizer_dtype=optimizer_dtype,
        lora=lora,
        quantization=quantize,
        remat="full" if remat == AUTO else remat,  # type: ignore[arg-type]
    )
    result = make_plan(work, topology, mesh, compiled=compiled, auto_remat=remat == AUTO)
    text = json.dumps({"model": model, **to_dict(result)}, indent=2)
    if json_file == "-":
        print(text)
        return
    if json_file is not None:
        write_text(json_file, text + "\n")
    # Outside of a terminal the width is fixed, so that no line is cut.
    render(result, Console(width=None if sys.stdout.isatty() else 160))


def model_config(model: str) -> Phi3Config:
    """Returns the config of a preset or of a checkpoint."""
    if Path(model).exists() or is_url(model):
        return Phi3Config.from_pretrained(model)
    return Phi3Config.preset(model)
