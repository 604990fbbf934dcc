"""Figures of a model's attention: heat maps by layer and head, profiles of distances, unseen angles."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phi3_jax.rope_lab.figures import add_legend, line_style
from phi3_jax.runs.plots import GREY, plain, short

Cell = tuple[str, int]
"""A rope's name, and a length."""


def entropies(
    ropes: Sequence[str], lengths: Sequence[int], values: Mapping[Cell, Float[np.ndarray, "L N"]]
) -> Figure:
    """Draws entropies in nats by layer and head: a row of panels for each rope, a column for each length."""
    figure = Figure(figsize=(1.2 + 2.6 * len(lengths), 0.8 + 2.3 * len(ropes)), layout="constrained")
    axes = figure.subplots(len(ropes), len(lengths), squeeze=False, sharex=True, sharey=True)
    highest = max(float(each.max()) for each in values.values())
    for row, rope in zip(axes, ropes, strict=True):
        for ax, length in zip(row, lengths, strict=True):
            image = ax.imshow(
                values[rope, length],
                cmap=matplotlib.colormaps["viridis"],
                vmin=0,
                vmax=highest,
                aspect="auto",
                interpolation="nearest",
            )
            ax.set_title(f"{short(rope)} at {length:,}", fontsize=8, parse_math=False)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            ax.tick_params(labelsize=8)
        row[0].set_ylabel("Layer")
    for ax in axes[-1]:
        ax.set_xlabel("Query head")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Entropy of attention (nats)")
    bar.outline.set_visible(False)
    return figure


def profiles(
    ropes: Sequence[str],
    lengths: Sequence[int],
    edges: Int[np.ndarray, " edges"],
    values: Mapping[Cell, Float[np.ndarray, " C"]],
) -> Figure:
    """Draws the share of attention after the sink in each bin of distances, a panel for each length."""
    figure = Figure(figsize=(1 + 4.2 * len(lengths), 4), layout="constrained")
    axes = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for ax, length in zip(axes, lengths, strict=True):
        for number, rope in enumerate(ropes):
            shares = 100 * values[rope, length]
            ax.plot(np.arange(len(shares)), shares, label=short(rope), **line_style(number), markersize=4)
        count = len(values[ropes[0], length])
        ticks = np.arange(0, count, 3)
        ax.set_xticks(ticks, [f"{edges[tick]:,}" for tick in ticks], fontsize=8)
        ax.set_title(f"{length:,} tokens", fontsize=10)
        ax.set_xlabel("Distance (tokens, from)")
        plain(ax)
    axes[0].set_ylabel("Share of attention, without the sink (%)")
    add_legend(axes[0])
    return figure


def unseen_angles(
    ropes: Sequence[str],
    lengths: Sequence[int],
    critical: int,
    values: Mapping[Cell, Float[np.ndarray, " P"]],
) -> Figure:
    """Draws the share of distances with unseen angles by pair, a panel for each length.

    Args:
        critical: the first pair that made no whole turn in training.
    """
    figure = Figure(figsize=(1 + 4.2 * len(lengths), 4), layout="constrained")
    axes = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for ax, length in zip(axes, lengths, strict=True):
        for number, rope in enumerate(ropes):
            shares = 100 * values[rope, length]
            ax.plot(np.arange(len(shares)), shares, label=short(rope), **line_style(number), markersize=3.5)
        ax.axvline(critical, color=GREY, linewidth=1, linestyle=":", zorder=0)
        ax.set_ylim(-3, 103)
        ax.set_title(f"{length:,} tokens", fontsize=10)
        ax.set_xlabel("Pair of dimensions")
        plain(ax)
    axes[0].set_ylabel("Distances with an unseen angle (%)")
    add_legend(axes[0])
    return figure
