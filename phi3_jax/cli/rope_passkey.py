"""The command `phi3-jax rope passkey`."""

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
from phi3_jax.rope_lab.passkey_report import FILES, table, write_passkey_report
from phi3_jax.rope_lab.passkey_run import measure_passkeys

app = typer.Typer(add_completion=False)


@app.command()
def passkey(
    lengths: Annotated[str, Option(help="The tokens of prompt and answer together, such as 2048,4096,8192.")],
    output: Annotated[
        Path,
        Option(
            help="A directory for rates, answers, heat map and report.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    rope: options.Ropes = None,
    model: options.Model = None,
    depths: Annotated[
        str, Option(help="The positions of the key in the text, from 0 (first line) to 1 (last line).")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, Option(min=1, max=100_000, help="The prompts for each length and depth.")] = 5,
    max_new_tokens: options.MaxNewTokens = 16,
    raw: Annotated[
        bool,
        Option("--raw", help="Use no chat template, and begin the answer; the default where there is none."),
    ] = False,
    text: Annotated[
        Path | None,
        Option(help="A file whose lines are the filler; default: built-in lines.", **options.INPUT),
    ] = None,
    seed: Annotated[int, Option(min=0, help="The seed of keys and filler.")] = 0,
    batch_size: Annotated[
        int | None, Option(min=1, help="The prompts of a batch; default: by memory.")
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Start over if the output cannot be resumed.")
    ] = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Hide a number in long texts and ask for it, under each rope.

    One model is loaded, and all ropes run in the same compiled programs, on the same prompts. The output is
    passkey.csv (rates), passkey.json (every answer), passkey.png (a heat map) and report.md. The same command
    resumes an interrupted run.
    """
    ropes = [parse_rope(each) for each in rope or ["none"]]
    tokens = options.numbers("lengths", lengths, least=2)
    shares = [_share(each) for each in depths.split(",")]
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    path = common.model_paths(model, None, cache_dir).base
    check_output(output, FILES, model=path, text=text)
    done = measure_passkeys(
        path,
        output,
        ropes,
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
    write_passkey_report(output, done)
    Console().print(table(done))
    tell(f"{len(done.trials):,} prompts, {done.new:,} of them in {done.seconds:,.1f} s")
    found = sum(trial.found for trial in done.trials)
    print(f"{output}: {found:,} of {len(done.trials):,} keys found")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--depths: {text.strip()!r} must be a number from 0 to 1")
    return share
