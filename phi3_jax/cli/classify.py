"""The command `phi3-jax classify`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from phi3_jax.classification import Summary, classify_file
from phi3_jax.cli import common, options
from phi3_jax.data.rows import BadRowError, TextFormat
from phi3_jax.errors import UserError
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare

app = typer.Typer(add_completion=False)

NOTABLE_WAIT = 0.1
"""The share of the time that the device waits for rows from which on the last line names it."""


@app.command()
def classify(
    source: Annotated[
        Path,
        Option("--input", help="A CSV, TSV, JSONL, Parquet or CoNLL file, by its suffix.", **options.INPUT),
    ],
    output: Annotated[
        Path, Option(help="A .csv, .tsv or .jsonl file, or .conll for tags of words.", **options.OUTPUT)
    ],
    model: Annotated[
        str | None,
        Option(help="The output of finetune, or any classifier: a directory or a hub name."),
    ] = None,
    adapter: options.Adapter = None,
    text_column: Annotated[str | None, Option(help="Default: as in training, or text.")] = None,
    text_pair_column: Annotated[str | None, Option(help="Default: as in training, or none.")] = None,
    words_column: Annotated[str | None, Option(help="Default: as in training, or words.")] = None,
    max_length: Annotated[
        int | None, Option(min=2, help="The most tokens of a row; default: as in training, or 512.")
    ] = None,
    encoding: Annotated[str, Option(help="Of a text file.")] = "utf-8",
    quoting: Annotated[
        bool, Option("--quoting/--no-quoting", help="Quotes enclose fields of CSV and TSV, or are text.")
    ] = True,
    column_names: Annotated[
        str | None, Option(help="Columns of a CSV or TSV file without a header, as in id,text.")
    ] = None,
    all_scores: Annotated[bool, Option("--all-scores", help="Add every class's probability.")] = False,
    threshold: Annotated[
        float | None,
        Option(min=0, max=1, help="The probability above which one of several labels counts; default: 0.5."),
    ] = None,
    keep_bad_rows: Annotated[
        bool,
        Option("--keep-bad-rows", help="Write bad rows without a prediction, and why in a column error."),
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing output; start over if it cannot be resumed.")
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="The rows of a batch.")] = 64,
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Label the rows of a file with a fine-tuned model.

    The same command resumes an interrupted run.
    """
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    try:
        done = classify_file(
            model,
            source,
            output,
            adapter=adapter,
            text_column=text_column,
            text_pair_column=text_pair_column,
            words_column=words_column,
            max_length=max_length,
            all_scores=all_scores,
            keep_bad_rows=keep_bad_rows,
            overwrite=overwrite,
            batch_size=batch_size,
            dtype=dtype,
            quantization=quantize,
            mesh=where,
            threshold=threshold,
            text=TextFormat(encoding, quoting, tuple(column_names.split(",")) if column_names else ()),
        )
    except BadRowError as error:
        raise UserError(
            f"{error}. --keep-bad-rows writes such rows without a prediction; for .jsonl and .conll the same "
            "command with it resumes after the last finished row"
        ) from error
    _print_statistics(done, output)


def _print_statistics(done: Summary, output: Path) -> None:
    if done.bad_rows:
        among = f"; among them: {'; '.join(done.faults)}" if done.faults else ""
        tell(f"{done.bad_rows} bad rows have no prediction{among}")
    if done.cut:
        words = f", and {done.untagged} words have no label" if done.untagged else ""
        tell(f"{done.cut} rows are longer than the maximum length and were cut{words}")
    seconds = max(done.seconds, 1e-9)
    share = done.waited / seconds
    waited = f", {share:.0%} of the time waiting for the host" if share >= NOTABLE_WAIT else ""
    print(
        f"{output}: {done.rows:,} rows; {done.new_rows:,} in {done.seconds:.1f} s, "
        f"{done.new_rows / seconds:,.1f} rows/s, {done.tokens / seconds:,.0f} tokens/s{waited}"
    )
