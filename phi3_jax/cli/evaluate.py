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
from phi3_jax.runs.files import replacing
from phi3_jax.runs.json_values import json_value

app = typer.Typer()


@app.command()
def evaluate(
    text: Annotated[Path, Argument(help="A text file, or .jsonl with a text a line.", dir_okay=False)],
    model: options.Model = None,
    length: Annotated[
        int | None, Option(min=2, help="Tokens of a window; default: the model's context.")
    ] = None,
    stride: Annotated[
        int | None, Option(min=1, help="Tokens between windows; default: half of the length.")
    ] = None,
    rope: options.Rope = None,
    max_tokens: Annotated[int | None, Option(min=2, help="Of each text; default: all.")] = None,
    text_key: Annotated[str, Option(help="Of a .jsonl file's texts.")] = "text",
    output: Annotated[
        Path | None, Option(help="A JSON file; default: standard output.", dir_okay=False)
    ] = None,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Perplexity and bits per byte of a text, in windows that slide over it; each token counts once."""

    argument = None if rope is None else parse_rope(rope)
    if not text.is_file():
        raise FileNotFoundError(f"there is no file {text}")
    where = prepare(mesh, False)
    path = common.model_path(model, cache_dir)
    found = evaluate_text(
        common.load_pipeline(str(path), dtype, cache_dir, where),
        text,
        rope=argument,
        length=length,
        stride=stride,
        max_tokens=max_tokens,
        key=text_key,
    )
    about = {"text": str(text), "model": str(path), "model_files": fingerprint(path), "dtype": dtype}
    told = json.dumps(json_value(found.to_dict() | about | {"rope": rope}), indent=2, ensure_ascii=False)
    if output is None:
        print(told)
        return
    with replacing(output) as work:
        work.write_text(told + "\n", encoding="utf-8")
