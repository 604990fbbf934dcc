"""The command `phi3-jax rope retrieve`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from phi3_jax.cli import common, options
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import check_output
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.rope_lab.retrieval.report import FILES, table, write_retrieval_report
from phi3_jax.rope_lab.retrieval.run import run_retrieval
from phi3_jax.rope_lab.retrieval.scores import score
from phi3_jax.rope_lab.retrieval.tasks import make_tasks

app = typer.Typer(add_completion=False)


@app.command()
def retrieve(
    lengths: Annotated[str, Option(help="The tokens of prompt and answer together, such as 2048,4096,8192.")],
    output: Annotated[
        Path,
        Option(
            help="A directory for scores, answers, figure and report.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    tasks: Annotated[
        str, Option(help="Some of passkey, multi-key, multi-value, multi-query, variable-tracking.")
    ] = "passkey",
    rope: options.Ropes = None,
    model: options.Model = None,
    depths: Annotated[
        str,
        Option(
            help="The positions in the text of the line that passkey and multi-key ask for, from 0 (first "
            "line) to 1 (last line)."
        ),
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, Option(min=1, max=100_000, help="The prompts for each length and depth.")] = 5,
    keys: Annotated[
        int, Option(min=2, help="The numbers that multi-key, multi-value and multi-query hide.")
    ] = 4,
    hops: Annotated[
        int, Option(min=1, help="The variables of a chain that have their value from another one.")
    ] = 4,
    chains: Annotated[int, Option(min=1, help="The chains of variables, of which one is asked for.")] = 2,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="End an answer after this many tokens; default: by the task.")
    ] = None,
    raw: Annotated[
        bool,
        Option("--raw", help="Use no chat template, and begin the answer; the default where there is none."),
    ] = False,
    text: Annotated[
        Path | None,
        Option(help="A file whose lines are the filler; default: built-in lines.", **options.INPUT),
    ] = None,
    seed: Annotated[int, Option(min=0, help="The seed of all that is drawn.")] = 0,
    batch_size: Annotated[
        int | None, Option(min=1, help="The prompts of a batch; default: by memory.")
    ] = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Hide lines in long texts and ask for what they hold, under each rope.

    One model is loaded, and all ropes run in the same compiled programs, on the same prompts. The output is
    retrieval.csv (scores), retrieval.json (every answer), retrieval.png (heat maps and bars) and report.md.
    The same command resumes an interrupted run; further tasks, lengths, trials and ropes are added to the
    output.
    """
    ropes = [parse_rope(each) for each in rope or ["none"]]
    tokens = options.numbers("lengths", lengths, least=2)
    shares = [_share(each) for each in depths.split(",")]
    names = [name.strip() for name in tasks.split(",")]
    kinds = make_tasks(names, keys=keys, hops=hops, chains=chains)
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    path = common.model_paths(model, None, cache_dir).base
    check_output(output, FILES, model=path, text=text)
    done = run_retrieval(
        path,
        output,
        ropes,
        tasks=kinds,
        lengths=tokens,
        depths=shares,
        trials=trials,
        max_new_tokens=max_new_tokens,
        raw=raw,
        text=text,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        mesh=where,
        overwrite=overwrite,
    )
    write_retrieval_report(output, done)
    Console().print(table(done))
    tell(f"{len(done.trials):,} answers, {done.new:,} of them in {done.seconds:,.1f} s")
    print(f"{output}: {score(done.trials):.1%} found in {len(done.trials):,} answers")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--depths: {text.strip()!r} must be a number from 0 to 1")
    return share
