"""The figure of retrieval tasks: heat maps by depth and length, and bars for tasks without a depth."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure

from phi3_jax.rope_lab.figures import COLOURS
from phi3_jax.rope_lab.retrieval.scores import TrialGrid
from phi3_jax.runs import plots
from phi3_jax.sizes import ceil_div

PANELS = 3
"""The most heat maps side by side."""

CELL = 0.75
"""The width of a cell, in inches."""

HATCHES = ("", "//", "..", "xx")
"""Patterns of bars, which differ when the colours repeat."""

BARS = 2.6
"""The height of a task with bars, in inches."""


def figure(grid: TrialGrid) -> Figure:
    """Draws each task below the others: a heat map for each rope, or bars for all ropes."""
    columns = min(PANELS, len(grid.ropes))
    rows = ceil_div(len(grid.ropes), columns)
    heights = [
        rows * (1.1 + max(1.6, 0.6 * CELL * len(grid.depths(task)))) if grid.has_depth(task) else BARS
        for task in grid.tasks
    ]
    width = columns * (1.2 + max(2.2, CELL * len(grid.lengths))) + 0.8
    if not all(map(grid.has_depth, grid.tasks)):
        width = max(width, 5.0)
    drawn = Figure(figsize=(width, sum(heights) + 0.3 * len(heights)), layout="constrained")
    parts = drawn.subfigures(len(grid.tasks), height_ratios=heights, squeeze=False)[:, 0]
    for part, task in zip(parts, grid.tasks, strict=True):
        part.suptitle(task, fontsize=11)
        if grid.has_depth(task):
            _heat_maps(part, grid, task, rows, columns)
        else:
            _bars(part, grid, task)
    return drawn


def _heat_maps(part: SubFigure, grid: TrialGrid, task: str, rows: int, columns: int) -> None:
    axes = part.subplots(rows, columns, squeeze=False)
    for ax in axes.ravel()[len(grid.ropes) :]:
        ax.set_visible(False)
    for ax, rope in zip(axes.ravel(), grid.ropes, strict=False):
        scores = 100 * grid.scores_by_depth(rope, task)
        image = ax.imshow(scores, cmap=matplotlib.colormaps["viridis"], vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(scores):
            colour = "black" if value > 55 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        _name_lengths(ax, grid)
        depths = grid.depths(task)
        ax.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        ax.set_ylabel("Depth")
        ax.set_title(plots.short(rope), fontsize=10, parse_math=False)
    bar = part.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Found (%)")
    bar.outline.set_visible(False)


def _bars(part: SubFigure, grid: TrialGrid, task: str) -> None:
    ax = part.subplots()
    width = 0.8 / len(grid.ropes)
    for number, rope in enumerate(grid.ropes):
        left = np.arange(len(grid.lengths)) + (number - (len(grid.ropes) - 1) / 2) * width
        ax.bar(
            left,
            100 * grid.scores(rope, task),
            0.9 * width,
            label=plots.short(rope),
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number // len(COLOURS) % len(HATCHES)],
            edgecolor="white",
        )
    _name_lengths(ax, grid)
    ax.set_xlim(-0.6, len(grid.lengths) - 0.4)
    ax.set_ylim(0, 100)
    ax.set_ylabel("Found (%)")
    plots.plain(ax)
    ax.grid(axis="x", visible=False)
    legend = part.legend(loc="outside right center", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _name_lengths(ax: Any, grid: TrialGrid) -> None:
    ax.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths], fontsize=8)
    ax.tick_params(length=0)
    ax.set_xlabel("Length (tokens)")
