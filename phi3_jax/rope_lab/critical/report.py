"""Results of an experiment on the critical pair: tables for people and programs, a figure, and factors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE
from rich.table import Table

from phi3_jax.evaluation.run_options import STATE
from phi3_jax.rope_lab.critical.plan import Candidate, MeasuredScaling, PairEffect
from phi3_jax.rope_lab.critical.run import CriticalPair
from phi3_jax.rope_lab.result_files import write_csv, write_figure
from phi3_jax.rope_lab.turns import theoretical_pair, turns
from phi3_jax.runs import plots
from phi3_jax.runs.json_values import json_value
from phi3_jax.runs.tables import markdown_table
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

CSV, JSON, FIGURE = "critical.csv", "critical.json", "critical.png"
MARKDOWN, FACTORS = "report.md", "factors.json"
FILES = (CSV, JSON, FIGURE, MARKDOWN, FACTORS, STATE)

KNOWN_COLOURS = {"none": "#6E6E6E", "linear": "#56B4E9", "ntk": "#E69F00", "yarn": "#009E73"}


def write_critical_report(output: Target, result: CriticalPair) -> None:
    """Writes critical.csv, critical.json, critical.png, report.md and factors.json, each as a whole."""
    write_csv(target_in(output, CSV), _rows(result))
    for name, content in ((JSON, _content(result)), (FACTORS, _factors(result))):
        text = json.dumps(json_value(content), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(target_in(output, name), text + "\n")
    write_figure(target_in(output, FIGURE), figure(result))
    write_text(target_in(output, MARKDOWN), "\n".join(_lines(result)) + "\n")


def theory(result: CriticalPair) -> int:
    """Returns the first pair that does not complete a turn in the trained length."""
    return theoretical_pair(result.base, result.base.original_max_position_embeddings)


def table(result: CriticalPair) -> Table:
    """Returns the candidates and the usual methods for a terminal, the best in bold."""
    shown = Table("critical pair", "dims", "perplexity", "attention factor", box=SIMPLE)
    for each in result.candidates:
        mark = "[bold]" if each == result.best else ""
        name = f"{each.pair}, theory" if each.pair == theory(result) else str(each.pair)
        cells = name, str(2 * each.pair), *_perplexity_and_attention(each)
        shown.add_row(*(mark + cell for cell in cells))
    shown.add_section()
    for name, known in result.known.items():
        shown.add_row(name, "", *_perplexity_and_attention(known))
    return shown


def _number(perplexity: float) -> str:
    return f"{perplexity:,.4f}" if perplexity < 1e6 else f"{perplexity:.2e}"


def _turns(result: CriticalPair) -> np.ndarray:
    return turns(result.base.inv_freq(), result.base.original_max_position_embeddings)


def _rows(result: CriticalPair) -> Iterator[Sequence[Any]]:
    pairs = result.base.dim // 2
    yield ["kind", "pair", "perplexity", "attention_factor", *(f"factor_{pair}" for pair in range(pairs))]
    for each in result.candidates:
        yield ["candidate", each.pair, *_values(each)]
    for name, known in result.known.items():
        yield [name, "", *_values(known)]
    attention = result.best.scaling.attention_factor
    for effect in result.effects:
        for kind, perplexity in (("plain", effect.plain), ("stretched", effect.stretched)):
            yield [f"pair {kind}", effect.pair, perplexity, attention, *[""] * pairs]


def _values(each: Candidate | MeasuredScaling) -> list[Any]:
    return [each.perplexity, each.scaling.attention_factor, *each.scaling.factors]


def _content(result: CriticalPair) -> dict[str, Any]:
    pair = theory(result)
    return {
        "asked": result.options,
        "theoretical_pair": pair,
        "theoretical_dimension": 2 * pair,
        "critical_pair": result.best.pair,
        "critical_dimension": 2 * result.best.pair,
        "crossing_of_single_pairs": result.crossing,
        "turns": _turns(result).tolist(),
        "candidates": [{"pair": each.pair, **_summary(each)} for each in result.candidates],
        "known": {name: _summary(each) for name, each in result.known.items()},
        "single_pairs": [each._asdict() for each in result.effects],
        "seconds": result.seconds,
    }


def _summary(each: Candidate | MeasuredScaling) -> dict[str, Any]:
    return {"perplexity": each.perplexity, **each.scaling._asdict()}


def _factors(result: CriticalPair) -> dict[str, Any]:
    """Returns the best candidate's rope as `--rope longrope:@factors.json` takes it."""
    best = result.best
    return {
        "rope_type": "longrope",
        "short_factor": [1.0] * len(best.scaling.factors),
        "long_factor": best.scaling.factors,
        "attention_factor": best.scaling.attention_factor,
        "original_max_position_embeddings": result.base.original_max_position_embeddings,
        "max_position_embeddings": result.base.max_position_embeddings,
        "about": {
            "critical_pair": best.pair,
            "perplexity": best.perplexity,
            "known": {name: each.perplexity for name, each in result.known.items()},
            "asked": result.options,
        },
    }


def figure(result: CriticalPair) -> Figure:
    """Draws perplexity by candidate and, if they were measured, the effects of single pairs."""
    panels = 2 if result.effects else 1
    drawn = Figure(figsize=(6.4 * panels, 4.6), layout="constrained")
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    _draw_candidates(axes[0], result)
    if result.effects:
        _draw_effects(axes[1], result)
    for ax in axes:
        pair = theory(result)
        ax.axvline(pair, color=plots.GREY, linewidth=1, linestyle=":", label=f"theory, {pair}", zorder=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("Perplexity of answers" if result.options["kind"] == "needle" else "Perplexity")
        ax.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        plots.plain(ax)
    return drawn


def _draw_candidates(ax: Axes, result: CriticalPair) -> None:
    factors = sorted({each.scaling.attention_factor for each in result.candidates})
    for attention, colour in zip(factors, (plots.BLUE, plots.ORANGE), strict=False):
        points = [each for each in result.candidates if each.scaling.attention_factor == attention]
        label = f"attention factor {attention:.4g}"
        ax.plot(*_finite(points), color=colour, marker="o", markersize=4, label=label)
    best = result.best
    ax.plot([best.pair], [best.perplexity], "o", markersize=10, markerfacecolor="none", color="black")
    ax.annotate(f"{best.pair}", (best.pair, best.perplexity), xytext=(0, -16), textcoords="offset points")
    for name, each in result.known.items():
        label = f"{name}, {each.perplexity:.2f}"
        ax.axhline(each.perplexity, color=KNOWN_COLOURS[name], linewidth=1, linestyle="--", label=label)
    # Far worse values would squeeze the others into a line; the legend has their numbers.
    values = [each.perplexity for each in result.candidates if np.isfinite(each.perplexity)]
    if values:
        low, high = min(values), float(np.quantile(values, 0.75))
        room = 0.15 * (high - low) or 0.01 * low
        ax.set_ylim(low - room, high + room)
    ax.set_xlabel("Candidate for the critical pair")


def _finite(points: Sequence[Candidate]) -> tuple[list[int], list[float]]:
    """Returns pairs and perplexities; infinite ones are gaps."""
    heights = [each.perplexity if np.isfinite(each.perplexity) else np.nan for each in points]
    return [each.pair for each in points], heights


def _draw_effects(ax: Axes, result: CriticalPair) -> None:
    pairs = [each.pair for each in result.effects]
    for name, colour, values in (
        ("plain", plots.ORANGE, [each.plain for each in result.effects]),
        ("stretched", plots.BLUE, [each.stretched for each in result.effects]),
    ):
        ax.plot(pairs, values, color=colour, marker="o", markersize=4, label=f"this pair {name}")
    ax.axhline(result.best.perplexity, color="black", linewidth=1, linestyle="--", label="best candidate")
    if result.crossing is not None:
        label = f"by single pairs, {result.crossing}"
        ax.axvline(result.crossing, color="#CC79A7", linewidth=1, linestyle="-.", label=label)
    ax.set_xlabel("Single pair of dims")


def _lines(result: CriticalPair) -> Iterator[str]:
    options, best, pair = result.options, result.best, theory(result)
    trained, length = result.base.original_max_position_embeddings, result.base.max_position_embeddings
    yield "# The critical pair"
    yield (
        f"\n{options['model']}, trained on {trained:,} tokens, in {options['dtype']}, at {length:,} tokens: "
        f"{_scored(options)}."
    )
    yield (
        f"\nIn theory the critical pair is {pair} of {result.base.dim // 2} (dim {2 * pair} of "
        f"{result.base.dim}), the first that does not turn once within {trained:,} tokens. The best "
        f"candidate is {best.pair} (dim {2 * best.pair}), which turns {_turned(result, best.pair)} times "
        f"there; its perplexity is {_number(best.perplexity)}."
    )
    yield "\n## Candidates\n"
    yield from markdown_table(
        ("pair", "turns", "perplexity", "attention factor"),
        [
            (str(each.pair), _turned(result, each.pair), *_perplexity_and_attention(each))
            for each in result.candidates
        ],
    )
    yield (
        f"\nFrom the pair on, wavelengths are stretched by {result.base.extension:.4g}; before it the "
        "factors grow geometrically from 1. Pair 0 is position interpolation, and the last pair is NTK-aware "
        "scaling."
    )
    yield "\n## Usual methods\n"
    yield from markdown_table(
        ("rope", "perplexity", "attention factor"),
        [(name, *_perplexity_and_attention(each)) for name, each in result.known.items()],
    )
    if result.effects:
        yield "\n## Single pairs\n"
        yield "The best candidate, with one pair's factor replaced.\n"
        yield from markdown_table(
            ("pair", "turns", "plain", "stretched"),
            [
                (str(each.pair), _turned(result, each.pair), _number(each.plain), _number(each.stretched))
                for each in result.effects
            ],
        )
        if result.crossing is not None:
            yield f"\n{sum_of_effects(result.effects, result.crossing)}."
    yield f"\n![Perplexity by candidate]({FIGURE})"


def _scored(options: Mapping[str, Any]) -> str:
    texts = f"{_count(options['samples'], 'part')} of {options['text']}"
    if options["skip_tokens"]:
        texts += f" after its first {options['skip_tokens']:,} tokens"
    if options["kind"] == "perplexity":
        return f"the perplexity of {texts}"
    each = "each of " if options["samples"] > 1 else ""
    return f"the perplexity of answers, to {_count(options['needles'], 'question')} in {each}{texts}"


def sum_of_effects(effects: Sequence[PairEffect], crossing: int) -> str:
    """Returns a sentence, without its full stop, about the `crossing` of single pairs."""
    best = "all of them plain"
    if crossing <= effects[-1].pair:
        best = f"those from {crossing} on stretched, and earlier ones plain"
    return f"If the effects of single pairs added up, the loss would be least with {best}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _turned(result: CriticalPair, pair: int) -> str:
    times = _turns(result)[pair]
    return f"{times:,.0f}" if times >= 100 else f"{times:.2g}"


def _perplexity_and_attention(each: Candidate | MeasuredScaling) -> tuple[str, str]:
    return _number(each.perplexity), f"{each.scaling.attention_factor:.4f}"
