"""The command `phi3-jax rope inspect`."""

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
from phi3_jax.rope_lab.inspection.attention_profiles import QUERIES, SINK_TOKENS
from phi3_jax.rope_lab.inspection.report import FILES, table, write_inspection
from phi3_jax.rope_lab.inspection.run import inspect_ropes

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    text: Annotated[
        Path, Option(help="A text file with at least as many tokens as the longest length.", **options.INPUT)
    ],
    lengths: Annotated[str, Option(help="Context lengths in tokens, such as 4096,8192.")],
    output: Annotated[
        Path,
        Option(
            help="A directory for arrays, tables, figures and report.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    model: options.Model = None,
    rope: options.Ropes = None,
    queries: Annotated[
        int, Option(min=1, help="The tokens in the second half of each text whose attention is measured.")
    ] = QUERIES,
    sink_tokens: Annotated[
        int, Option(min=1, help="The first tokens whose attention counts as that of the sink.")
    ] = SINK_TOKENS,
    skip_tokens: Annotated[int, Option(min=0, help="Skip this many tokens at the start of the text.")] = 0,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Show attention by layer and head, and unseen angles, under each rope.

    For sampled tokens of a text, this measures the entropy of attention, the share of the first tokens, and
    the distances. For each pair of dims it counts the angles that no text of the trained length has. The
    output is attention.npz, angles.npz, tables, figures and report.md. The same command resumes an
    interrupted run.
    """
    arguments = [parse_rope(each) for each in rope or ["none"]]
    context_lengths = options.numbers("lengths", lengths, least=2)
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    path = common.model_paths(model, None, cache_dir).base
    check_output(output, FILES, model=path, text=text)
    inspection = inspect_ropes(
        path,
        text,
        output,
        arguments,
        lengths=context_lengths,
        queries=queries,
        sink_tokens=sink_tokens,
        skip_tokens=skip_tokens,
        dtype=dtype,
        mesh=where,
        overwrite=overwrite,
    )
    write_inspection(output, inspection)
    Console().print(table(inspection))
    tell(
        f"{output}: report.md, attention.npz, angles.npz, attention.csv, angles.csv, entropy.png, "
        f"profile.png, angles.png; {inspection.new} of {len(inspection.profiles)} measured in "
        f"{inspection.seconds:,.1f} s"
    )
