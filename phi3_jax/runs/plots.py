"""Figures of a run, drawn without pyplot, which has global state.

Colours are those of Okabe and Ito or shades of one colour, which people with any colour vision can tell
apart.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phi3_jax.runs.files import replacing
from phi3_jax.sizes import ceil_div

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6E6E6E"

MOST_CLASSES = 100
"""The most classes that a confusion matrix is drawn for; with more, the names would be unreadable."""

MOST_OUTPUTS = 9
"""The most outputs of a regression that are drawn, the first ones."""

DPI = 150
_NAME = 48  # the most characters of a class name


def curves(task: str, log: Sequence[Mapping[str, Any]], metric: str, best_step: int | None) -> Figure:
    """Draws the losses, the metric and the learning rate against the step.

    `log` has the records that `read_log` returns. Panels without values are left out.
    """
    loss = "Loss (squared error)" if task == "regression" else "Loss (nats)"
    train = _series(log, "train")
    validation = _series(log, "validation")
    panels: list[tuple[str, str, tuple[str, ...]]] = [(loss, "loss", ("train", "validation"))]
    if metric != "loss" and metric in validation:
        panels.append((metric.replace("_", " ").capitalize(), metric, ("validation",)))
    if "learning_rate" in train:
        panels.append(("Learning rate", "learning_rate", ("train",)))
    figure = Figure(figsize=(8, 1 + 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, (title, name, kinds) in zip(axes, panels, strict=True):
        for kind in kinds:
            steps, values = (train if kind == "train" else validation).get(name, ([], []))
            _curve(ax, np.array(steps), np.array(values, float), kind, smooth=name == "loss")
        ax.set_ylabel(title)
        ax.margins(x=0.02)
        if best_step is not None:
            ax.axvline(best_step, color=GREY, linewidth=1, linestyle=":", label="best step")
        if name == "learning_rate":
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        plain(ax)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=9, loc="upper right", edgecolor="none", framealpha=0.9)
    figure.align_ylabels()
    axes[-1].set_xlabel("Step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    return figure


def _series(log: Sequence[Mapping[str, Any]], kind: str) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the steps and finite values of one kind of record, by name."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in log:
        if record["kind"] != kind:
            continue
        for name, value in record.items():
            if name not in ("kind", "step") and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def _curve(ax: Axes, steps: np.ndarray, values: np.ndarray, kind: str, smooth: bool) -> None:
    if not len(steps):
        return
    if kind == "validation":
        ax.plot(steps, values, color=ORANGE, marker="o", markersize=4, linewidth=1.5, label="validation")
        return
    window = len(values) // 25 if smooth else 0
    if window < 2:
        ax.plot(
            steps, values, color=BLUE, linewidth=1.5, marker="." if len(values) == 1 else "", label="train"
        )
        return
    ax.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3)
    # Each mean is drawn in the middle of its window.
    means = np.convolve(values, np.full(window, 1 / window), "valid")
    middles = np.convolve(steps, np.full(window, 1 / window), "valid")
    ax.plot(middles, means, color=BLUE, linewidth=1.8, label=f"train, mean of {window} records")


def confusion_matrix(counts: Int[np.ndarray, "C C"], names: Sequence[str], unit: str) -> Figure:
    """Draws the percentage of each true class (row) predicted as each class (column); `unit` is counted."""
    size = len(names)
    support = counts.sum(axis=1, keepdims=True)
    percent = 100 * counts / np.maximum(support, 1)
    few = size <= 12
    cell, font = (0.62, 10.0) if few else (0.25, 7.0)  # inches and points
    shown = [short(name) for name in names]
    side = max(cell * size, 2.4)
    # The names and the scale are outside; saving crops the figure to fit.
    figure = Figure(figsize=(side, side))
    ax = figure.add_axes((0, 0, 1, 1))
    image = ax.imshow(percent, cmap=matplotlib.colormaps["Blues"], vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(percent >= 0.5), strict=True):
        value = percent[row, column]
        colour = "white" if value > 55 else "black"
        text_size = font if few else 5.5
        ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=text_size)
    ticks = np.arange(size)
    upright = few and 0.1 * max(map(len, shown)) < side / size  # a letter is a tenth of an inch wide
    ax.set_xticks(ticks, shown, rotation=0 if upright else 90, fontsize=font, parse_math=False)
    ax.set_yticks(ticks, shown, fontsize=font, parse_math=False)
    ax.set_xticks(ticks[1:] - 0.5, minor=True)
    ax.set_yticks(ticks[1:] - 0.5, minor=True)
    ax.grid(which="minor", color="#E4E4E4", linewidth=0.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_color("#C0C0C0")
    label_size = 11 if few else 14
    ax.set_xlabel("Predicted class", fontsize=label_size)
    ax.set_ylabel("True class", fontsize=label_size)
    # Beside the matrix, with its height, 0.2 inches wide.
    bar = figure.colorbar(image, cax=ax.inset_axes((1 + 0.15 / side, 0, 0.2 / side, 1)))
    bar.set_label(f"{unit} of the true class (%)", fontsize=label_size)
    bar.outline.set_visible(False)
    return figure


def scatter(
    true: Float[np.ndarray, "B C"], predicted: Float[np.ndarray, "B C"], names: Sequence[str]
) -> Figure:
    """Draws predicted against true values, in one panel for each output of a regression."""
    outputs = min(true.shape[1], MOST_OUTPUTS)
    columns = math.ceil(math.sqrt(outputs))
    rows = ceil_div(outputs, columns)
    side = 5.0 if outputs == 1 else 3.6
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[outputs:]:
        ax.set_visible(False)
    for output, ax in enumerate(axes[:outputs]):
        x, y = true[:, output], predicted[:, output]
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        ends = [min(x.min(), y.min()), max(x.max(), y.max())] if len(x) else [0.0, 1.0]
        ax.plot(ends, ends, color="black", linewidth=1, zorder=3, linestyle="--", label="predicted = true")
        thin = float(np.clip(12 / math.sqrt(len(x) + 1), 0.15, 0.8))
        ax.scatter(x, y, s=14, color=BLUE, alpha=thin, linewidths=0)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel("True value")
        ax.set_ylabel("Predicted value")
        ax.set_title(short(names[output]), fontsize=11, parse_math=False)
        ax.legend(frameon=False, fontsize=9, loc="upper left")
        plain(ax)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; an existing file is replaced as a whole."""
    with replacing(path) as work:
        draw(figure, work)


def draw(figure: Figure, file: Path) -> None:
    """Writes a PNG to a new file."""
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes; the report has the full names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def plain(ax: Axes) -> None:
    """Removes the box around the axes and adds a light grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E8E8E8", linewidth=0.8)
    ax.set_axisbelow(True)


def short(name: str) -> str:
    """Returns a name in one line, shortened if it is long."""
    name = " ".join(name.split())
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"
