"""Figures of a study: perplexity and retrieval by length, factors by pair, several studies side by side."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from phi3_jax.rope_lab.figures import add_legend, line_style, scale_lengths, scale_perplexities
from phi3_jax.rope_lab.study.results import StudyResults
from phi3_jax.runs.plots import GREY, plain, short


def title_of(trained: str) -> str:
    """Returns the words for a training: untrained, or what is trained."""
    return {"none": "Untrained", "full": "Trained: all parameters", "lora": "Trained: LoRA"}.get(
        trained, trained
    )


def perplexity_figure(results: StudyResults) -> Figure:
    """Draws perplexity by length, a panel for each training with a scale of its own."""
    figure, axes = _panels(len(results.trained))
    for ax, trained in zip(axes, results.trained, strict=True):
        every = [row.perplexity for row in results.perplexities if row.trained == trained]
        for number, rope in enumerate(results.ropes):
            line = [results.perplexity(rope.name, trained, length) for length in results.lengths]
            if any(value is not None for value in line):
                heights = [value if value is not None and math.isfinite(value) else np.nan for value in line]
                ax.plot(results.lengths, heights, label=short(rope.name), **line_style(number), markersize=5)
        scale_lengths(ax, results.lengths)
        scale_perplexities(ax, [value for value in every if math.isfinite(value)])
        _finish(ax, results.original, title_of(trained))
    return figure


def retrieval_figure(results: StudyResults) -> Figure:
    """Draws the share of right answers by length, over all tasks, a panel for each training."""
    lengths = sorted({row.length for row in results.retrievals})
    trainings = list(dict.fromkeys(row.trained for row in results.retrievals))
    figure, axes = _panels(len(trainings))
    for ax, trained in zip(axes, trainings, strict=True):
        for number, rope in enumerate(results.ropes):
            rates = [results.retrieval_rate(rope.name, trained, length) for length in lengths]
            if any(rate is not None for rate in rates):
                heights = [np.nan if rate is None else 100 * rate for rate in rates]
                ax.plot(lengths, heights, label=short(rope.name), **line_style(number), markersize=5)
        scale_lengths(ax, lengths)
        ax.set_ylim(-3, 103)
        ax.set_ylabel("Right answers (%)")
        _finish(ax, results.original, title_of(trained))
    return figure


def factors_figure(results: StudyResults) -> Figure:
    """Draws the factors of each rope at the study's length, by pair of dimensions."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    ax = figure.subplots()
    for number, rope in enumerate(results.ropes):
        label = f"{short(rope.name)}, attention factor {rope.attention_factor:.3f}"
        ax.plot(rope.factors, label=label, **line_style(number), markersize=3.5)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("Pair of dimensions, fast to slow")
    ax.set_ylabel("Factor of plain rope's wavelength")
    add_legend(ax)
    plain(ax)
    return figure


def beside_figure(studies: Sequence[StudyResults]) -> Figure:
    """Draws several studies in one panel for each training.

    Lengths are multiples of each original length, and perplexities of that of the base within it, so that
    models of different sizes and texts compare. A colour stands for a rope, and a line style for a study.
    """
    trained = list(dict.fromkeys(each for study in studies for each in study.trained))
    ropes = list(dict.fromkeys(rope.name for study in studies for rope in study.ropes))
    figure = Figure(figsize=(5.6 * len(trained), 4.8), layout="constrained")
    axes = figure.subplots(1, len(trained), squeeze=False)[0]
    for ax, each in zip(axes, trained, strict=True):
        values: list[float] = []
        for style, study in zip(("-", "--", "-.", ":"), studies, strict=False):
            for name, stretches, ratios in relative_perplexities(study, each):
                values += ratios
                label = f"{short(name)}, {short(study.name)}"
                look = line_style(ropes.index(name)) | {"linestyle": style}
                ax.plot(stretches, ratios, label=label, **look, markersize=4)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale_perplexities(ax, values)
        ax.set_xlabel("Context length, relative to the original")
        ax.set_ylabel("Perplexity, relative to the base's")
        _finish(ax, 1, title_of(each))
    return figure


def relative_perplexities(study: StudyResults, trained: str) -> list[tuple[str, list[float], list[float]]]:
    """Returns each rope's name, its lengths and its finite perplexities, both relative to the base's."""
    reference = study.reference()
    lines = []
    for rope in study.ropes if reference else ():
        points = [
            (length / study.original, value / reference)
            for length in study.lengths
            if (value := study.perplexity(rope.name, trained, length)) is not None
            and math.isfinite(value)
            and reference is not None
        ]
        if points:
            lines.append((rope.name, [x for x, _ in points], [y for _, y in points]))
    return lines


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1.6 + 4.8 * count, 4.6), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _finish(ax: Axes, original: float, title: str) -> None:
    ax.axvline(original, color=GREY, linewidth=1, linestyle=":", zorder=0)
    ax.set_title(title, fontsize=11)
    add_legend(ax)
    plain(ax)
