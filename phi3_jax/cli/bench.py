"""The command `phi3-jax bench`."""

from pathlib import Path
from typing import Annotated

import typer

from phi3_jax.bench.run import run_bench
from phi3_jax.cli import common, options
from phi3_jax.parallel.processes import prepare

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="A directory, a .gguf file, or a preset for random weights; default: SmolLM2-135M."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Use only this many layers of a preset.")] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="A text file to answer; default: random tokens.", **options.INPUT)
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(min=1, help="Compare drafts of this many tokens, copied from the text, with none."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="The length of the random prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="The new tokens after the first.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="The rows of the batch.")] = 1,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Measure batch instead, on this many prompts of all lengths."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="The number of measurements; the two sides take turns.")
    ] = 5,
    peer: Annotated[
        str | None,
        typer.Option(help="What to compare with: transformers, the default if installed, or llama.cpp."),
    ] = None,
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure generate, side by side with transformers or llama.cpp.

    transformers takes part where it is installed and no mesh is given. llama.cpp reads the same GGUF file.
    """
    where = prepare(mesh, distributed)
    common.keep_compiled_programs(cache_dir)
    run_bench(
        model,
        layers=layers,
        prompt=prompt,
        prompt_lookup=prompt_lookup,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        requests=requests,
        rounds=rounds,
        dtype=dtype,
        mesh=where,
        quantization=quantize,
        peer=peer,
        cache_dir=cache_dir,
    )
