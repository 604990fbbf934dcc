"""The command `phi3-jax evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.cli import common, options
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.evaluate import evaluate as evaluate_text
from phi3_jax.parallel.processes import prepare
from phi3_jax.runs.json_values import json_value
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.outputs import replacing

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    text: Annotated[
        Path, Argument(help="A text file, or a .jsonl file with one text a line.", **options.INPUT)
    ],
    model: options.Model = None,
    adapter: options.Adapter = None,
    length: Annotated[
        int | None, Option(min=2, help="The tokens of a window; default: the model's context.")
    ] = None,
    stride: Annotated[
        int | None, Option(min=1, help="The tokens from one window to the next; default: half of the length.")
    ] = None,
    rope: options.Rope = None,
    max_tokens: Annotated[
        int | None, Option(min=2, help="The most tokens of each text; default: all.")
    ] = None,
    text_key: Annotated[str, Option(help="The key of the texts in a .jsonl file.")] = "text",
    output: Annotated[
        str | None,
        Option(help="A JSON file for the results, or its URL; default: standard output.", **options.OUTPUT),
    ] = None,
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure the perplexity and the bits per byte of a text.

    Windows slide over the text; each token counts once.
    """
    argument = None if rope is None else parse_rope(rope)
    if not text.is_file():
        raise FileNotFoundError(f"there is no file {text}")
    where = prepare(mesh, False)
    paths = common.model_paths(model, adapter, cache_dir)
    check_outputs({"--output": output}, {"the text": text} | paths.inputs)
    result = evaluate_text(
        common.load_pipeline(paths, dtype, cache_dir, where, quantize=quantize),
        text,
        rope=argument,
        length=length,
        stride=stride,
        max_tokens=max_tokens,
        key=text_key,
    )
    about = {
        "text": str(text),
        "model": str(paths.base),
        "model_files": fingerprint(paths.base),
        **paths.adapter_record,
        "dtype": dtype,
    }
    if quantize is not None:
        about["quantize"] = quantize
    report = json.dumps(json_value(result.to_dict() | about | {"rope": rope}), indent=2, ensure_ascii=False)
    if output is None:
        print(report)
        return
    with replacing(output) as work:
        work.write_text(report + "\n", encoding="utf-8")
