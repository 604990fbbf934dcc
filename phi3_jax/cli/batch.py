"""The command `phi3-jax batch`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Exit, Option

from phi3_jax.batch import Engine
from phi3_jax.batch.inputs import STANDARD
from phi3_jax.batch.run import batch_file
from phi3_jax.batch.summary import BatchSummary
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.cli import common, options
from phi3_jax.evaluation.scorer import frequencies_key
from phi3_jax.lora import ModelPaths
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.fetch import display_name, fetch_files
from phi3_jax.storage.parts import PART_SECONDS

SOME_ERRORS = 3
"""The exit code where every line has an answer and some answers are errors."""

REQUESTS = (".jsonl", ".jsonl.gz")
"""The endings of the files of a folder that are read."""

app = typer.Typer(add_completion=False)


@app.command()
def batch(
    sources: Annotated[
        list[str],
        Option(
            "--input",
            help="A file of requests, one a line, a pattern such as 'part-*.jsonl.gz', or a folder; may be "
            "repeated; .gz is unpacked; -: standard input.",
        ),
    ],
    output: Annotated[
        Path,
        Option(
            help="A file for the answers, one a line, in the order in which they finish; a URL that ends in "
            "/: a folder for files of them; -: standard output.",
            **options.OUTPUT,
        ),
    ],
    model: options.Model = None,
    adapter: options.Adapter = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, Option(min=0, help="Draw from this many likeliest tokens; 0: from all.")] = 0,
    min_p: Annotated[
        float, Option(help="Draw from tokens at least this likely, relative to the likeliest one.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, Option(help="Above 1: tokens that occurred become less likely.")
    ] = 1.0,
    seed: options.Seed = 0,
    stop: Annotated[list[str] | None, Option(help="End an answer after this text; may be repeated.")] = None,
    max_length: Annotated[
        int | None,
        Option(
            help="The most tokens of prompt and answer together; default: the context, or less by memory."
        ),
    ] = None,
    slots: Annotated[
        int | None, Option(min=1, help="The prompts that are answered at a time; default: by memory.")
    ] = None,
    rope: options.Rope = None,
    stats: Annotated[Path | None, Option(help="A JSON file for totals and speeds.", **options.OUTPUT)] = None,
    part_seconds: Annotated[
        float,
        Option(min=0, help="Answers wait this long before they are written to a URL; a kill loses them."),
    ] = PART_SECONDS,
    overwrite: Annotated[bool, Option("--overwrite", help="Start over and replace the output.")] = False,
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Answer files of requests.

    A line is {"id": ..., "prompt": ...} or {"id": ..., "messages": [...]}, perhaps with its own options, or a
    line of OpenAI's Batch API. The same command resumes an interrupted run. With several processes each takes
    its share of the lines, and --mesh divides the devices of each.
    """
    where = prepare(mesh, distributed, own_devices=True)
    requests = [path for source in sources for path in _find(source, cache_dir)]
    generation: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": stop or [],
    }
    paths = common.model_paths(model, adapter, cache_dir)
    check_outputs(
        {"--output": None if output == STANDARD else output, "--stats": stats},
        {f"--input {path}": path for path in requests if path != STANDARD} | paths.inputs,
    )

    def engine() -> Engine:
        pipeline = common.load_pipeline(paths, dtype, cache_dir, where, rope, quantize)
        return Engine(pipeline.compiled, pipeline.tokenizer, slots=slots, max_length=max_length, **generation)

    summary = batch_file(
        engine,
        requests,
        output,
        # Standard output cannot be resumed, so that the weights need not be read for a fingerprint.
        options={}
        if output == STANDARD
        else _model_options(paths, dtype, rope, quantize) | generation | {"max_length": max_length},
        overwrite=overwrite,
        stats=stats,
        part_seconds=part_seconds,
    )
    tell(_totals(summary))
    if summary.errors:
        raise Exit(SOME_ERRORS)


def _find(source: str, cache_dir: Path | None) -> list[Path]:
    """Returns the files that a value of --input names, after fetching those of a store."""
    if source == str(STANDARD):
        return [STANDARD]
    return fetch_files(source, wanted=lambda name: name.endswith(REQUESTS), cache_dir=cache_dir)


def _model_options(paths: ModelPaths, dtype: str, rope: str | None, quantize: str | None) -> dict[str, Any]:
    """Returns what the answers depend on besides the options of generation."""
    options: dict[str, Any] = {
        "model": display_name(paths.base),
        "model_files": fingerprint(paths.base),
        "dtype": dtype,
    } | paths.adapter_record
    if quantize is not None:
        options["quantize"] = quantize
    if rope is not None:
        config = common.config_with(paths, rope)
        lengths = (config.original_max_position_embeddings, config.context_length)
        # The numbers, too, since the file that defines a type may change.
        options["rope"] = config.rope_parameters | {
            "frequencies": [frequencies_key(config, length) for length in lengths]
        }
    return options


def _totals(summary: BatchSummary) -> str:
    share = "" if summary.share_of_peak is None else f", {summary.share_of_peak:.1%} of the devices' peak"
    return (
        f"{summary.done:,} lines, {summary.errors:,} of them errors; "
        f"{summary.done - summary.resumed:,} in {summary.seconds:.1f} s: "
        f"{summary.prompt_tokens:,} tokens of prompts ({summary.computed_prompt_tokens:,} computed), "
        f"{summary.input_rate:,.0f} tokens/s in, "
        f"{summary.completion_tokens:,} made, {summary.output_rate:,.1f} tokens/s out{share}"
    )
