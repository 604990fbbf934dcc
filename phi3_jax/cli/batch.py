"""The command `phi3-jax batch`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Exit, Option

from phi3_jax.batch import Engine
from phi3_jax.batch.run import batch_file
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.cli import common, options
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare

REFUSED = 3
"""The exit code where every line is done and some got an error."""

app = typer.Typer()


@app.command()
def batch(
    source: Annotated[
        str, Option("--input", help="Lines of requests; packed if the name ends with .gz; -: standard input.")
    ],
    output: Annotated[str, Option(help="One answer a line, as they finish; -: standard output.")],
    model: options.Model = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, Option(min=0, help="Draw from this many tokens; 0: from all.")] = 0,
    min_p: Annotated[float, Option(help="Draw from tokens at least this likely.")] = 0.0,
    repetition_penalty: Annotated[
        float, Option(help="Above 1: tokens that occurred become less likely.")
    ] = 1.0,
    seed: options.Seed = 0,
    stop: Annotated[list[str] | None, Option(help="End behind this text; may be repeated.")] = None,
    max_length: Annotated[
        int | None,
        Option(
            help="Of prompt and answer together; default: the context, or what a quarter of memory holds."
        ),
    ] = None,
    slots: Annotated[
        int | None, Option(min=1, help="Prompts that are answered at a time; default: by memory.")
    ] = None,
    rope: options.Rope = None,
    stats: Annotated[Path | None, Option(help="A JSON file for totals and speeds.", dir_okay=False)] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Begin anew, whatever the output holds.")] = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Answer a file of requests; go on where the same command was cut off.

    A line is {"id": ..., "prompt": ...} or {"id": ..., "messages": [...]}, with options of its own, or a line
    of OpenAI's Batch API. Of several processes each takes its share of the lines, --mesh divides the devices
    of each.
    """
    where = prepare(mesh, distributed, own_devices=True)
    if source != "-" and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    said: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": stop or [],
    }

    path = common.model_path(model, cache_dir)

    def engine() -> Engine:
        pipeline = common.load_pipeline(str(path), dtype, cache_dir, where, rope)
        return Engine(pipeline.compiled, pipeline.tokenizer, slots=slots, max_length=max_length, **said)

    about: dict[str, Any] = {"model": str(path.resolve()), "model_files": fingerprint(path), "dtype": dtype}
    if rope is not None:
        about["rope"] = common.config_with(path, rope).rope_parameters
    done = batch_file(
        engine,
        Path(source),
        Path(output),
        options=about | said | {"max_length": max_length},
        overwrite=overwrite,
        stats=stats,
    )
    share = "" if done.share_of_peak is None else f", {done.share_of_peak:.1%} of the devices' peak"
    fresh = done.done - done.resumed
    tell(
        f"{done.done:,} lines, {done.errors:,} of them errors; {fresh:,} in {done.seconds:.1f} s: "
        f"{done.prompt_tokens:,} tokens of prompts ({done.computed_prompt_tokens:,} computed), "
        f"{done.input_rate:,.0f} tokens/s in, {done.completion_tokens:,} made, {done.output_rate:,.1f} "
        f"tokens/s out{share}"
    )
    if done.errors:
        raise Exit(REFUSED)
