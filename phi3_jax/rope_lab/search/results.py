"""Results of a search for rope factors: the factors, its history, a figure, and a model that has them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE
from rich.table import Table

from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.evaluation.run_options import STATE
from phi3_jax.rope_lab.result_files import write_csv, write_figure
from phi3_jax.rope_lab.search.search import RopeSearch
from phi3_jax.rope_lab.search.space import Individual
from phi3_jax.runs import plots
from phi3_jax.runs.json_values import json_value
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

FACTORS, HISTORY, FIGURE, MODEL = "factors.json", "history.csv", "search.png", "model"
FILES = (FACTORS, HISTORY, FIGURE, MODEL, STATE)

KNOWN_COLOURS = {
    "none": "#6E6E6E",
    "linear": "#56B4E9",
    "ntk": "#E69F00",
    "yarn": "#009E73",
    "model": "#CC79A7",
}


def write_results(
    output: Target, search: RopeSearch, options: Mapping[str, Any], model: Path, config: Phi3Config
) -> None:
    """Writes factors.json, history.csv, search.png and model/, each as a whole.

    Args:
        model: the checkpoint that was searched on.
        config: the config of the new model, with the best factors that a config can express.
    """
    reconfigure_checkpoint(model, target_in(output, MODEL), config)
    factors = json_value(_factors(search, options, config))
    write_text(target_in(output, FACTORS), json.dumps(factors, indent=2, ensure_ascii=False) + "\n")
    write_csv(target_in(output, HISTORY), _history(search))
    write_figure(target_in(output, FIGURE), figure(search))


def _factors(search: RopeSearch, options: Mapping[str, Any], config: Phi3Config) -> dict[str, Any]:
    """Returns the best rope as `--rope longrope:@factors.json` takes it, and the search's options."""
    best, plain = search.best(), search.best(initial_tokens=0)
    about: dict[str, Any] = {
        "perplexity": _searched(search, best.individual),
        "known": {name: _searched(search, each) for name, each in search.known.items()},
        "measured": len(search.scored),
        "asked": options,
    }
    if search.stages.finalists:
        held_out = search.results(search.stages.held_out)
        about["held_out"] = {
            "perplexity": best.perplexity,
            "known": {name: held_out[each] for name, each in search.known.items()},
        }
    if best.individual.initial_tokens:
        about["best_without_initial_tokens"] = plain.individual._asdict() | {
            "perplexity": _searched(search, plain.individual)
        }
    return {
        "rope_type": "longrope",
        "short_factor": [1.0] * len(best.individual.factors),
        "long_factor": best.individual.factors,
        "attention_factor": best.individual.attention_factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initial_tokens": best.individual.initial_tokens,
        "about": about,
    }


def _searched(search: RopeSearch, individual: Individual) -> float:
    """Returns the perplexity of an individual on the whole text of the search."""
    return search.results(search.stages.last)[individual]


def _history(search: RopeSearch) -> Iterator[Sequence[Any]]:
    pairs = len(search.scored[0].individual.factors)
    yield [
        "evaluation",
        "iteration",
        "stage",
        "known_as",
        "perplexity",
        "best",
        "initial_tokens",
        "attention_factor",
        *(f"factor_{pair}" for pair in range(pairs)),
    ]
    names = {individual: name for name, individual in search.known.items()}
    best: dict[int, float] = {}
    for evaluation, (iteration, (individual, perplexity, stage)) in enumerate(
        zip(search.iterations, search.scored, strict=True), start=1
    ):
        if individual in search.space:
            best[stage] = min(best.get(stage, math.inf), perplexity)
        yield [
            evaluation,
            iteration,
            "held-out" if stage == search.stages.held_out else stage + 1,
            names.get(individual, ""),
            perplexity,
            best.get(stage, ""),
            individual.initial_tokens,
            individual.attention_factor,
            *individual.factors,
        ]


def figure(search: RopeSearch) -> Figure:
    """Draws perplexity by evaluation, and the best factors beside those of the known methods."""
    drawn = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    _draw_progress(left, search)
    _draw_factors(right, search)
    return drawn


def _draw_progress(ax: Axes, search: RopeSearch) -> None:
    last = search.stages.last
    measured = [
        (iteration, each)
        for iteration, each in zip(search.iterations, search.scored, strict=True)
        if each.stage == last
    ]
    iterations = np.array([iteration for iteration, _ in measured])
    values = np.array([each.perplexity for _, each in measured])
    inside = np.array([each.individual in search.space for _, each in measured])
    numbers = np.arange(1, len(values) + 1)
    best = np.minimum.accumulate(np.where(inside, values, np.inf))
    ax.scatter(numbers, values, s=10, color=plots.BLUE, alpha=0.35, linewidths=0, label="each")
    means = [
        (numbers[here].mean(), values[here].mean())
        for iteration in range(iterations.max() + 1)
        if np.isfinite(values[here := (iterations == iteration) & np.isfinite(values)]).any()
    ]
    ax.plot(
        *zip(*means, strict=True), color=plots.GREY, marker="o", markersize=3, label="mean of an iteration"
    )
    ax.step(
        numbers, best, where="post", color=plots.ORANGE, linewidth=1.8, label=f"best so far, {best[-1]:.2f}"
    )
    for name, individual in search.known.items():
        perplexity = _searched(search, individual)
        label = f"{name}, {perplexity:.2f}"
        ax.axhline(perplexity, color=KNOWN_COLOURS[name], linewidth=1, linestyle="--", label=label)
    # Far worse values would squeeze the others into a line; the legend has their numbers.
    finite = values[np.isfinite(values)]
    low, high = finite.min(), np.quantile(finite, 0.7)
    room = 0.08 * (high - low) or 0.01 * low
    ax.set_ylim(low - room, high + room)
    ax.set_xlabel("Evaluation on all samples" if last else "Evaluation")
    ax.set_ylabel("Perplexity")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8, edgecolor="none", framealpha=0.9, loc="upper right")
    plots.plain(ax)


def _draw_factors(ax: Axes, search: RopeSearch) -> None:
    for name, individual in search.known.items():
        ax.plot(individual.factors, color=KNOWN_COLOURS[name], linewidth=1.2, linestyle="--", label=name)
    best, plain = search.best().individual, search.best(initial_tokens=0).individual
    label = f"found, attention factor {best.attention_factor:.4f}"
    if best.initial_tokens:
        label += f", {best.initial_tokens} tokens unscaled"
        ax.plot(plain.factors, color=plots.BLUE, linewidth=1.5, label="found, none unscaled")
    ax.plot(best.factors, color=plots.ORANGE, linewidth=2, marker=".", label=label)
    ax.set_xlabel("Pair of dimensions, fast to slow")
    ax.set_ylabel("Factor of plain rope's wavelength")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    plots.plain(ax)


def table(search: RopeSearch) -> Table:
    """Returns the known methods and the best individuals for a terminal, the best first."""
    rows = dict(search.known)
    best, plain = search.best().individual, search.best(initial_tokens=0).individual
    rows["found"] = best
    if best != plain:
        rows["found, none unscaled"] = plain
    held_out = search.results(search.stages.held_out)
    columns = ["rope", "perplexity", *["held out"] * bool(held_out), "attention factor", "unscaled tokens"]
    shown = Table(*columns, box=SIMPLE)
    decides = held_out or search.results(search.stages.last)
    for name, individual in sorted(rows.items(), key=lambda row: decides[row[1]]):
        perplexities = [_searched(search, individual), *([held_out[individual]] if held_out else [])]
        shown.add_row(
            name,
            *(f"{each:.4f}" for each in perplexities),
            f"{individual.attention_factor:.4f}",
            str(individual.initial_tokens),
        )
    return shown
