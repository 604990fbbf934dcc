"""Figures of ropes: perplexity by length, and the wavelengths of every pair of dimensions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from phi3_jax.runs.plots import BLUE, GREY, ORANGE, plain, short

COLOURS = (GREY, "#56B4E9", "#E69F00", "#009E73", ORANGE, BLUE, "#CC79A7", "#000000")
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":")

FAR = 4
"""The ratio of worst and best perplexity from which the scale is logarithmic."""


def perplexities(
    lengths: Sequence[int], values: Mapping[str, Sequence[float]], trained: int | None = None
) -> Figure:
    """Draws perplexity against the context length, a line for each rope; `trained` is a length to mark."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    ax = figure.subplots()
    finite = [value for line in values.values() for value in line if math.isfinite(value)]
    for number, (name, line) in enumerate(values.items()):
        heights = [value if math.isfinite(value) else np.nan for value in line]
        ax.plot(lengths, heights, label=short(name), **line_style(number), markersize=6)
    if trained is not None and lengths[0] <= trained <= lengths[-1]:
        ax.axvline(trained, color=GREY, linewidth=1, linestyle=":", zorder=0)
        ax.annotate(
            "trained",
            (trained, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.xaxis.set_minor_locator(NullLocator())
    if finite and max(finite) > FAR * min(finite):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Context length (tokens)")
    ax.set_ylabel("Perplexity")
    legend(ax)
    plain(ax)
    return figure


def wavelengths(ropes: Sequence[tuple[str, np.ndarray, np.ndarray]], length: int, trained: int) -> Figure:
    """Draws each rope's wavelengths and their factors relative to plain rope, by pair of dimensions.

    Args:
        ropes: name, wavelengths in tokens [P], factors [P].
        length: the length that the frequencies are for.
        trained: the length that the model was trained on.
    """
    figure = Figure(figsize=(8, 7.2), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for number, (name, lengths, factors) in enumerate(ropes):
        pairs = np.arange(len(lengths))
        upper.plot(pairs, lengths, label=short(name), **line_style(number), markersize=3.5)
        lower.plot(pairs, factors, **line_style(number), markersize=3.5)
    for tokens, label in {length: "longest length", trained: "trained length"}.items():
        upper.axhline(tokens, color=GREY, linewidth=1, linestyle=":", zorder=0)
        upper.annotate(
            f"{label}, {tokens:,}",
            (0, tokens),
            xytext=(2, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
        )
    upper.set_yscale("log")
    upper.set_ylabel("Wavelength (tokens)")
    legend(upper, "lower right")
    lower.set_yscale("log", base=2)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lower.set_ylabel("Factor of plain rope's wavelength")
    lower.set_xlabel("Pair of dimensions")
    for ax in (upper, lower):
        plain(ax)
        ax.margins(x=0.02)
    figure.align_ylabels()
    return figure


def line_style(number: int) -> dict[str, Any]:
    """Returns a colour, marker and line style that differ for many ropes, also in black and white."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "linewidth": 1.6,
    }


def legend(ax: Axes, where: Literal["best", "lower right"] = "best") -> None:
    """Draws the names of lines, which may have any text."""
    drawn = ax.legend(fontsize=9, loc=where, edgecolor="none", framealpha=0.9)
    for text in drawn.get_texts():
        text.set_parse_math(False)
