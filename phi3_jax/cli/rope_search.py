"""The command `phi3-jax rope search`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from phi3_jax.cli import common, options
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import check_output
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.rope_lab.search import Evolution
from phi3_jax.rope_lab.search_results import FILES, MODEL, table
from phi3_jax.rope_lab.search_run import SearchResult, search_ropes
from phi3_jax.storage.targets import Target, target_in

app = typer.Typer(add_completion=False)


@app.command()
def search(
    text: Annotated[
        Path, Option(help="The text for measuring perplexity; not the text of later tests.", **options.INPUT)
    ],
    length: Annotated[int, Option(min=2, help="The context length in tokens to search for.")],
    output: Annotated[
        Path,
        Option(
            help="A directory for factors, history, figure and model.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    model: options.Model = None,
    windows: Annotated[
        int, Option(min=1, help="The number of parts of the text to measure, each of --length tokens.")
    ] = 1,
    skip_tokens: Annotated[
        int, Option(min=0, help="Skip this many tokens at the start of the text, for later tests.")
    ] = 0,
    population: Annotated[int, Option(min=3, help="The individuals of the first iteration.")] = 16,
    iterations: Annotated[
        int, Option(min=0, help="The further iterations, each of population - parents individuals.")
    ] = 10,
    parents: Annotated[int, Option(min=2, help="The number of best individuals that have children.")] = 4,
    mutation_probability: Annotated[
        float, Option(help="The probability that a mutant's gene changes.")
    ] = 0.3,
    seed: Annotated[int, Option(min=0, help="The seed of the random draws.")] = 0,
    bound: Annotated[float, Option(help="The largest factor, in units of the stretch.")] = 1.25,
    attention_factor: Annotated[
        str,
        Option(
            help="Choices for the factor on cosine and sine: numbers, or the formulas of longrope and yarn."
        ),
    ] = "1,longrope,yarn",
    initial_tokens: Annotated[
        str,
        Option(
            help="Choices for the number of first tokens that stay unscaled, such as 0,4,64; 0 is required."
        ),
    ] = "0",
    batch_size: Annotated[
        int | None, Option(min=1, help="The individuals that are measured at a time; default: by memory.")
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Start over if the output cannot be resumed.")
    ] = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Search rope factors for a longer context (LongRoPE).

    The search starts from position interpolation, NTK-aware scaling and YaRN, each with its own attention
    factor. The output is factors.json (for --rope longrope:@factors.json), history.csv, search.png and model/
    (the checkpoint with an ordinary longrope config). The same command resumes an interrupted run.
    """
    evolution = Evolution(population, iterations, parents, mutation_probability, seed)
    attention_factors = [_attention_factor(each) for each in attention_factor.split(",")]
    unscaled = options.numbers("initial-tokens", initial_tokens, least=0)
    where = prepare(mesh, False)
    common.keep_compiled_programs(cache_dir)
    path = common.model_paths(model, None, cache_dir).base
    check_output(output, FILES, model=path, text=text)
    done = search_ropes(
        path,
        text,
        output,
        length=length,
        windows=windows,
        skip_tokens=skip_tokens,
        evolution=evolution,
        attention_factors=attention_factors,
        initial_tokens=unscaled,
        bound=bound,
        batch_size=batch_size,
        dtype=dtype,
        mesh=where,
        overwrite=overwrite,
    )
    _print_result(done, output)
    print(f"{output}: perplexity {done.search.best().perplexity:.4f} at {length:,} tokens")


def _print_result(done: SearchResult, output: Target) -> None:
    Console().print(table(done.search))
    tell(f"{len(done.search.scored):,} measured, {done.new:,} of them in {done.seconds:,.1f} s")
    best = done.search.best()
    if best.individual.initial_tokens:
        tell(
            f"{target_in(output, MODEL)} has the best factors without unscaled tokens, because no config can "
            f"express the {best.individual.initial_tokens} of the best"
        )


def _attention_factor(text: str) -> str | float:
    text = text.strip()
    if text in ("longrope", "yarn"):
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"--attention-factor: {text!r} must be a positive number, longrope or yarn")
    return number
