"""The command `phi3-jax rope compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from phi3_jax.cli import common, options
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.run_options import check_output
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.rope_lab.comparison.compare import compare_ropes
from phi3_jax.rope_lab.comparison.report import FILES, fact_table, table, write_comparison

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    text: Annotated[
        Path, Option(help="A text file with at least as many tokens as the longest length.", **options.INPUT)
    ],
    lengths: Annotated[str, Option(help="Context lengths in tokens, such as 2048,4096,8192.")],
    output: Annotated[
        Path,
        Option(
            help="A directory for tables, figures and report.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    model: options.Model = None,
    rope: options.Ropes = None,
    stride: Annotated[
        int | None,
        Option(
            min=1, help="The tokens from one window to the next, at most the length; default: half of it."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        Option(min=2, help="The tokens that are scored at every length; default: the longest length."),
    ] = None,
    skip_tokens: Annotated[int, Option(min=0, help="Skip this many tokens at the start of the text.")] = 0,
    facts: Annotated[
        int, Option(min=0, help="Also hide this many facts in the text, and ask for them at its end.")
    ] = 0,
    fact_texts: Annotated[
        int, Option(min=1, help="The number of texts with hidden facts at each length.")
    ] = 1,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure the perplexity of a text by context length, under each rope.

    One model is loaded, all ropes run in the same compiled programs, and all lengths score the same tokens.
    The output is results.csv, results.json, perplexity.png, wavelengths.png and report.md. The same command
    resumes an interrupted run.
    """
    arguments = [parse_rope(each) for each in rope or ["none"]]
    context_lengths = options.numbers("lengths", lengths, least=2)
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    path = common.model_paths(model, None, cache_dir).base
    check_output(output, FILES, model=path, text=text)
    comparison = compare_ropes(
        path,
        text,
        output,
        arguments,
        lengths=context_lengths,
        stride=stride,
        max_tokens=max_tokens,
        skip_tokens=skip_tokens,
        facts=facts,
        fact_texts=fact_texts,
        dtype=dtype,
        mesh=where,
        overwrite=overwrite,
    )
    write_comparison(output, comparison)
    Console().print(table(comparison))
    if comparison.facts:
        Console().print(fact_table(comparison))
    seconds = comparison.seconds
    tell(
        f"{output}: report.md, results.csv, results.json, perplexity.png, wavelengths.png; "
        f"{seconds['all']:,.1f} s, {seconds['forward']:,.1f} of them forward passes, "
        f"{seconds['compile']:,.1f} compilation"
    )
