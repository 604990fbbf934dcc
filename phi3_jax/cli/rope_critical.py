"""The command `phi3-jax rope critical`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from typer import Option

from phi3_jax.cli import common, options
from phi3_jax.evaluation.run_options import check_output
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.rope_lab.critical.report import FILES, sum_of_effects, table, theory, write_critical_report
from phi3_jax.rope_lab.critical.run import find_critical_pair
from phi3_jax.rope_lab.objectives.needles import NEEDLES
from phi3_jax.rope_lab.objectives.options import Kind, ObjectiveOptions

app = typer.Typer(add_completion=False)


@app.command()
def critical(
    text: Annotated[Path, Option(help="A real text; not the text of later tests.", **options.INPUT)],
    length: Annotated[int, Option(min=3, help="The context length in tokens to stretch the model to.")],
    output: Annotated[
        Path,
        Option(
            help="A directory for tables, figure, report and factors.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    model: options.Model = None,
    objective: Annotated[
        Kind,
        Option(help="Score the answers to questions about facts hidden in the text, or all its tokens."),
    ] = "needle",
    samples: Annotated[
        int, Option(min=1, help="The number of parts of the text to measure, each of --length tokens.")
    ] = 1,
    needles: Annotated[int, Option(min=1, help="The facts that are hidden in each part.")] = NEEDLES,
    skip_tokens: Annotated[int, Option(min=0, help="Skip this many tokens at the start of the text.")] = 0,
    seed: Annotated[int, Option(min=0, help="The seed of facts and their positions.")] = 0,
    candidates: Annotated[
        str | None,
        Option(
            help="Pairs to try as the critical one, such as 12,16,20; default: every fourth pair, then those "
            "between the best and its neighbours."
        ),
    ] = None,
    yarn_attention: Annotated[
        bool, Option("--yarn-attention", help="Also try each candidate with YaRN's attention factor.")
    ] = False,
    pairs: Annotated[
        str | None,
        Option(
            help="Pairs to measure alone, plain and stretched, in the best candidate, such as 14,16,18; or "
            "all."
        ),
    ] = None,
    trained_length: Annotated[
        int | None,
        Option(min=2, help="The tokens of the texts that the model was trained on; default: by its config."),
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, help="The ropes that are measured at a time; default: by memory.")
    ] = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Find the pair of dims from which on a longer context needs interpolation (LongRoPE2).

    Pairs of dims from the critical one on are interpolated, those before it less and less. Each candidate is
    measured beside plain rope, position interpolation, NTK-aware scaling and YaRN. The output is
    critical.csv, critical.json, critical.png, report.md and factors.json (for --rope
    longrope:@factors.json). The same command resumes an interrupted run.
    """
    tried = None if candidates is None else options.numbers("candidates", candidates, least=0)
    single: Sequence[int] | Literal["all"] = ()
    if pairs is not None:
        single = "all" if pairs == "all" else options.numbers("pairs", pairs, least=0)
    if objective == "perplexity":
        needles = seed = 0
    asked = ObjectiveOptions(
        objective, (length,), samples=samples, needles=needles, seed=seed, skip_tokens=skip_tokens
    )
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    path = common.model_paths(model, None, cache_dir).base
    check_output(output, FILES, model=path, text=text)
    result = find_critical_pair(
        path,
        text,
        output,
        objective=asked,
        candidates=tried,
        yarn_attention=yarn_attention,
        pairs=single,
        trained=trained_length,
        batch_size=batch_size,
        dtype=dtype,
        mesh=where,
        overwrite=overwrite,
    )
    write_critical_report(output, result)
    Console().print(table(result))
    tell(f"{result.new:,} ropes measured in {result.seconds:,.1f} s")
    if result.crossing is not None:
        tell(sum_of_effects(result.effects, result.crossing))
    print(f"{output}: critical pair {result.best.pair}, in theory {theory(result)}")
