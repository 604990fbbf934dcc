"""The command `phi3-jax bench-input`: what the host does for a device, without a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from phi3_jax.checkpoint import resolve
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.cli import options
from phi3_jax.errors import UserError
from phi3_jax.train.bench_input import InputBenchOptions, make_bench_task, run_input_bench

app = typer.Typer(add_completion=False)


@app.command()
def bench_input(
    source: Annotated[
        Path | None,
        Option("--input", help="A file as classify reads it; default: generated rows.", **options.INPUT),
    ] = None,
    model: options.Model = None,
    task: Annotated[
        Literal["sequence-classification", "token-classification"],
        Option(help="Whether rows are texts or words."),
    ] = "sequence-classification",
    text_column: Annotated[str, Option(help="The column of texts.")] = "text",
    text_pair_column: Annotated[str | None, Option(help="The column of second texts; default: none.")] = None,
    words_column: Annotated[str, Option(help="The column of words.")] = "words",
    label_column: Annotated[
        str | None, Option(help="The column of labels, read as by finetune; default: none, as by classify.")
    ] = None,
    max_length: Annotated[int, Option(min=2, help="The most tokens of a row.")] = 512,
    batch_size: Annotated[int, Option(min=1, help="The rows of a batch.")] = 64,
    rows: Annotated[int, Option(min=1, help="The most rows to read.")] = 20000,
    cores: Annotated[int | None, Option(min=1, help="Measure on this many cores; default: all.")] = None,
    rounds: Annotated[
        int, Option(min=1, help="The number of measurements; one core and all take turns.")
    ] = 3,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure how fast the host reads, tokenises, batches and writes rows, without a model."""
    if source is None and label_column is not None:
        raise UserError("--label-column is of a file; add --input")
    run_input_bench(
        InputBenchOptions(
            default_model(cache_dir) if model is None else resolve(model),
            source,
            rows,
            make_bench_task(
                task,
                text_column=text_column,
                text_pair_column=text_pair_column,
                words_column=words_column,
                label_column=label_column,
                max_length=max_length,
            ),
            batch_size,
            cores,
        ),
        rounds,
    )
