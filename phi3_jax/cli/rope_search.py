"""The command `phi3-jax rope search`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from typer import Option

from phi3_jax.cli import common, options
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import check_output
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.rope_lab.objectives.needles import NEEDLES
from phi3_jax.rope_lab.objectives.options import Kind, ObjectiveOptions
from phi3_jax.rope_lab.search.cma_es import CmaEs
from phi3_jax.rope_lab.search.cobyqa import Cobyqa
from phi3_jax.rope_lab.search.evolution import Evolution
from phi3_jax.rope_lab.search.results import FILES, MODEL, table
from phi3_jax.rope_lab.search.run import SearchResult, search_ropes
from phi3_jax.rope_lab.search.search import Method, Stages
from phi3_jax.storage.targets import Target, target_in

app = typer.Typer(add_completion=False)

KEPT = 0.33
"""The default share of individuals that a stage keeps."""


@app.command()
def search(
    text: Annotated[
        Path, Option(help="The text for measuring perplexity; not the text of later tests.", **options.INPUT)
    ],
    lengths: Annotated[
        str, Option(help="The context lengths in tokens to search for, such as 16384 or 16384,32768.")
    ],
    output: Annotated[
        Path,
        Option(
            help="A directory for factors, history, figure and model.",
            parser=options.output_directory,
            metavar="DIRECTORY",
        ),
    ],
    model: options.Model = None,
    objective: Annotated[
        Kind,
        Option(help="Score all tokens of the text, or the answers to questions about facts hidden in it."),
    ] = "perplexity",
    weights: Annotated[
        str | None, Option(help="The weights of the lengths, such as 1,2; default: equal.")
    ] = None,
    samples: Annotated[
        int, Option(min=1, help="The number of parts of the text to measure at each length.")
    ] = 1,
    held_out: Annotated[
        int,
        Option(min=0, help="The parts at the end of the text that decide between the finalists; 0: none."),
    ] = 1,
    finalists: Annotated[
        int, Option(min=1, help="The best individuals that are measured on the held-out parts.")
    ] = 3,
    stage_samples: Annotated[
        str | None,
        Option(help="Measure on this many parts first, such as 1 or 1,2, and only the best on all."),
    ] = None,
    kept: Annotated[
        str | None,
        Option(help="The share of individuals that each of these stages keeps, such as 0.3; default: 0.33."),
    ] = None,
    needles: Annotated[
        int, Option(min=1, help="The facts that are hidden in each part; for --objective needle.")
    ] = NEEDLES,
    skip_tokens: Annotated[
        int, Option(min=0, help="Skip this many tokens at the start of the text, for later tests.")
    ] = 0,
    method: Annotated[
        Literal["evolution", "cma-es", "cobyqa"],
        Option(help="LongRoPE's evolution; or CMA-ES, or COBYQA, which measures one by one, on a few knots."),
    ] = "cobyqa",
    population: Annotated[
        int | None,
        Option(min=3, help="The individuals of an iteration; default: 16, or those of CMA-ES."),
    ] = None,
    iterations: Annotated[
        int, Option(min=0, help="The iterations after the first; evolution measures population - parents.")
    ] = 10,
    parents: Annotated[
        int, Option(min=2, help="The number of best individuals that have children; for evolution.")
    ] = 4,
    mutation_probability: Annotated[
        float, Option(help="The probability that a mutant's gene changes; for evolution.")
    ] = 0.3,
    knots: Annotated[
        int,
        Option(min=2, help="The points of the line through the logarithms of factors; not for evolution."),
    ] = 6,
    seed: Annotated[int, Option(min=0, help="The seed of the random draws.")] = 0,
    bound: Annotated[float, Option(help="The largest factor, in units of the stretch.")] = 1.25,
    attention_factor: Annotated[
        str,
        Option(
            help="The range of the factor on cosine and sine: numbers, or the formulas of longrope and yarn."
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
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Search rope factors for a longer context (LongRoPE).

    The search starts from position interpolation, NTK-aware scaling and YaRN, each with its own attention
    factor. The output is factors.json (for --rope longrope:@factors.json), history.csv, search.png and model/
    (the checkpoint with an ordinary longrope config). The same command resumes an interrupted run.
    """
    chosen: Method
    if method == "evolution":
        chosen = Evolution(population or 16, iterations, parents, mutation_probability, seed)
    elif method == "cma-es":
        chosen = CmaEs(population, iterations, knots, seed)
    else:
        if population is not None:
            raise UserError("--population does nothing with --method cobyqa, which measures one by one")
        chosen = Cobyqa(iterations, knots)
    asked = ObjectiveOptions(
        objective,
        tuple(options.numbers("lengths", lengths, least=2)),
        None if weights is None else tuple(_positive_numbers("weights", weights)),
        samples=samples,
        needles=needles if objective == "needle" else 0,
        seed=seed if objective == "needle" else 0,
        skip_tokens=skip_tokens,
        held_out=held_out,
    )
    first = [] if stage_samples is None else options.numbers("stage-samples", stage_samples, least=1)
    shares = [KEPT] * len(first) if kept is None else _positive_numbers("kept", kept)
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
        objective=asked,
        method=chosen,
        stages=Stages(tuple(shares), finalists if held_out else 0),
        stage_samples=first,
        attention_factors=attention_factors,
        initial_tokens=unscaled,
        bound=bound,
        batch_size=batch_size,
        dtype=dtype,
        mesh=where,
        overwrite=overwrite,
    )
    _print_result(done, output)
    where_measured = " on held-out text" if held_out else ""
    print(f"{output}: perplexity {done.search.best().perplexity:.4f} at {lengths} tokens{where_measured}")


def _print_result(done: SearchResult, output: Target) -> None:
    Console().print(table(done.search))
    rate = f", {60 * done.new / done.seconds:,.1f} a minute" if done.new else ""
    tell(f"{len(done.search.scored):,} measured, {done.new:,} of them in {done.seconds:,.1f} s{rate}")
    best = done.search.best()
    if best.individual.initial_tokens:
        tell(
            f"{target_in(output, MODEL)} has the best factors without unscaled tokens, because no config can "
            f"express the {best.individual.initial_tokens} of the best"
        )


def _positive_numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(each) for each in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < each < float("inf") for each in values):
        raise UserError(f"--{name}: {text!r} must be positive numbers, separated by commas")
    return values


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
