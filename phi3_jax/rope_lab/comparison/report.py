"""Results of a comparison of ropes: tables for people and programs, and figures."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from phi3_jax.config.rope_argument import trained_length
from phi3_jax.evaluation.run_options import STATE
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.rope_lab.comparison.compare import Comparison, scaled_frequencies
from phi3_jax.rope_lab.figures import perplexities, wavelengths
from phi3_jax.rope_lab.result_files import write_csv, write_figure
from phi3_jax.runs.json_values import json_value
from phi3_jax.runs.tables import markdown_table
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

CSV, JSON, MARKDOWN = "results.csv", "results.json", "report.md"
PERPLEXITY, WAVELENGTHS = "perplexity.png", "wavelengths.png"
FILES = (CSV, JSON, MARKDOWN, PERPLEXITY, WAVELENGTHS, STATE)

COLUMNS = ("rope", "length", "stride", "tokens", "loss", "perplexity", "seconds")


def write_comparison(output: Target, comparison: Comparison) -> None:
    """Writes results.csv, results.json, perplexity.png, wavelengths.png and report.md, each as a whole."""
    trained = trained_length(comparison.trained)
    lines = {
        rope.name: [comparison.cell(rope.name, length).loss.perplexity for length in comparison.lengths]
        for rope in comparison.ropes
    }
    write_figure(target_in(output, PERPLEXITY), perplexities(comparison.lengths, lines, trained))
    scaled = list(scaled_frequencies(comparison))
    write_figure(target_in(output, WAVELENGTHS), wavelengths(scaled, comparison.lengths[-1], trained))
    rows = ([row[name] for name in COLUMNS] for row in _rows(comparison))
    write_csv(target_in(output, CSV), [COLUMNS, *rows])
    content = json_value(_content(comparison))
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(target_in(output, JSON), text + "\n")
    write_text(target_in(output, MARKDOWN), "\n".join(_lines(comparison)) + "\n")


def table(comparison: Comparison) -> Table:
    """Returns the perplexities for a terminal, with the best of each length in bold."""
    shown = Table(box=SIMPLE, title="Perplexity by context length", title_justify="left")
    shown.add_column("rope", overflow="fold")
    best = {length: _best(comparison, length) for length in comparison.lengths}
    for length in comparison.lengths:
        shown.add_column(f"{length:,}", justify="right")
    for rope in comparison.ropes:
        cells = [
            f"[bold]{value}[/bold]" if rope.name == best[length] else value
            for length, value in zip(comparison.lengths, _perplexities(comparison, rope.name), strict=True)
        ]
        shown.add_row(rope.name.replace("[", r"\["), *cells)
    return shown


def fact_table(comparison: Comparison) -> Table:
    """Returns the shares of facts that are found, for a terminal."""
    title = "Facts found in the text, and the perplexity of the answers"
    shown = Table(box=SIMPLE, title=title, title_justify="left")
    shown.add_column("rope", overflow="fold")
    for length in comparison.lengths:
        shown.add_column(f"{length:,}", justify="right")
    for name, *cells in _fact_rows(comparison):
        shown.add_row(name.replace("[", r"\["), *cells)
    return shown


def _fact_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for rope in comparison.ropes:
        cells = (comparison.fact_cell(rope.name, length) for length in comparison.lengths)
        yield (
            rope.name,
            *(f"{cell.found / cell.asked:.0%} ({_number(cell.loss.perplexity)})" for cell in cells),
        )


def _best(comparison: Comparison, length: int) -> str:
    at_length = [cell for cell in comparison.cells if cell.length == length]
    return min(at_length, key=lambda cell: cell.loss.loss / cell.loss.tokens).rope


def _perplexities(comparison: Comparison, rope: str) -> list[str]:
    values = (comparison.cell(rope, length).loss.perplexity for length in comparison.lengths)
    return [_number(value) for value in values]


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for cell in comparison.cells:
        yield {
            "rope": cell.rope,
            "length": cell.length,
            "stride": cell.stride,
            "tokens": cell.loss.tokens,
            "loss": cell.loss.loss / cell.loss.tokens,
            "perplexity": cell.loss.perplexity,
            "seconds": round(cell.seconds, 3),
        }


def _content(comparison: Comparison) -> dict[str, Any]:
    scaled = {name: (lengths, factors) for name, lengths, factors in scaled_frequencies(comparison)}
    return {
        "asked": comparison.options,
        "tokens": comparison.tokens,
        "trained_length": trained_length(comparison.trained),
        "ropes": {
            rope.name: {
                "parameters": rope.parameters,
                "attention_factor": frequencies_for(rope.config, comparison.lengths[-1])[1],
                "wavelengths": scaled[rope.name][0].tolist(),
                "factors": scaled[rope.name][1].tolist(),
            }
            for rope in comparison.ropes
        },
        "results": list(_rows(comparison)),
        "facts": [
            {
                "rope": cell.rope,
                "length": cell.length,
                "found": cell.found,
                "asked": cell.asked,
                "perplexity": cell.loss.perplexity,
            }
            for cell in comparison.facts
        ],
        "seconds": comparison.seconds,
    }


def _lines(comparison: Comparison) -> Iterator[str]:
    options, trained = comparison.options, trained_length(comparison.trained)
    yield "# Ropes compared"
    yield (
        f"\n{options['model']}, trained on {trained:,} tokens, in {options['dtype']}; {options['text']}"
        + (f" after its first {options['skip_tokens']:,} tokens" if options["skip_tokens"] else "")
        + "."
    )
    yield "\n## Perplexity by context length\n"
    yield from markdown_table(
        ("rope", *(f"{length:,}" for length in comparison.lengths)),
        [(rope.name, *_perplexities(comparison, rope.name)) for rope in comparison.ropes],
    )
    strides = {cell.length: cell.stride for cell in comparison.cells}
    apart = any(stride == length < comparison.tokens for length, stride in strides.items())
    yield (
        f"\nEvery length scores the same {comparison.tokens - 1:,} tokens once: the first "
        f"{comparison.tokens:,} except the first one"
        + (", and except the first of each window where windows do not overlap" if apart else "")
        + ". Windows slide over them: "
        + ", ".join(_spacing(strides[length], length, comparison.tokens) for length in comparison.lengths)
        + ". Scaled frequencies are those for the whole length of a window."
    )
    yield f"\n![Perplexity against context length]({PERPLEXITY})"
    if comparison.facts:
        texts = options["fact_texts"]
        yield "\n## Facts found in the text\n"
        yield from markdown_table(
            ("rope", *(f"{length:,}" for length in comparison.lengths)), list(_fact_rows(comparison))
        )
        places = "a text" if texts == 1 else f"each of {texts} texts"
        yield (
            f"\n{options['facts']} facts are hidden in {places} of each length, and asked for at its end. A "
            "fact is found if each token of its answer is the most likely one. In parentheses is the "
            "perplexity of the answers' tokens."
        )
    yield "\n## Ropes\n"
    yield from markdown_table(
        ("rope", "type", "context", "wavelengths times", "attention factor", "unscaled first tokens"),
        [
            _rope_row(comparison, *each)
            for each in zip(comparison.ropes, scaled_frequencies(comparison), strict=True)
        ],
    )
    yield f"\nAt {comparison.lengths[-1]:,} tokens; the figure shows every pair of dims."
    yield f"\n![Wavelengths of each rope, and their factors]({WAVELENGTHS})"
    yield "\n## Time\n"
    yield from markdown_table(
        ("", "seconds"),
        [
            ("forward passes", f"{comparison.seconds['forward']:,.1f}"),
            ("compilation", f"{comparison.seconds['compile']:,.1f}"),
            ("all", f"{comparison.seconds['all']:,.1f}"),
        ],
    )
    yield "\nTimes of the last command, without measurements of earlier ones."


def _spacing(stride: int, length: int, tokens: int) -> str:
    return f"one window at {length:,}" if length == tokens else f"{stride:,} apart at {length:,}"


def _rope_row(
    comparison: Comparison, rope: Any, scaled: tuple[str, np.ndarray, np.ndarray]
) -> tuple[str, ...]:
    _, _, factors = scaled
    _, attention_factor = frequencies_for(rope.config, comparison.lengths[-1])
    spread = (
        f"{factors.min():.4g}"
        if np.allclose(factors, factors[0])
        else f"{factors.min():.4g} to {factors.max():.4g}"
    )
    return (
        rope.name,
        rope.config.rope_scaling.rope_type,
        f"{rope.config.context_length:,}",
        spread,
        f"{attention_factor:.4g}",
        str(rope.initial_tokens),
    )
