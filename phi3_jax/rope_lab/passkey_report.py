"""Results of a pass key measurement: rates in a table, a heat map, every answer, and a report."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from phi3_jax.evaluation.run_options import STATE
from phi3_jax.rope_lab.passkey_run import PasskeyResult, Trial
from phi3_jax.rope_lab.result_files import write_csv, write_figure
from phi3_jax.runs import plots
from phi3_jax.runs.json_values import json_value
from phi3_jax.runs.tables import markdown_table
from phi3_jax.sizes import ceil_div
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

RATES, ANSWERS, FIGURE, REPORT = "passkey.csv", "passkey.json", "passkey.png", "report.md"
FILES = (RATES, ANSWERS, FIGURE, REPORT, STATE)

LISTED = 100
"""The most failures of a rope in the report; the JSON file has all of them."""

SHOWN = 160
"""The most characters of an answer in the report."""

PANELS = 3
"""The most panels of the heat map side by side."""


class TrialGrid:
    """Trials by rope, length and depth, in the order of the options."""

    def __init__(self, result: PasskeyResult):
        self.ropes = list(dict.fromkeys(trial.rope for trial in result.trials))
        self.lengths = list(dict.fromkeys(trial.length for trial in result.trials))
        self.depths = list(dict.fromkeys(trial.depth for trial in result.trials))
        self.trials = result.trials
        self._cells: defaultdict[tuple[str, int, float], list[Trial]] = defaultdict(list)
        for trial in result.trials:
            self._cells[trial.rope, trial.length, trial.depth].append(trial)

    def cell(self, rope: str, length: int, depth: float) -> list[Trial]:
        return self._cells[rope, length, depth]

    def rates(self, rope: str) -> Float[np.ndarray, "depths lengths"]:
        """Returns the share of found keys by depth and length."""
        return np.array(
            [[rate(self.cell(rope, length, depth)) for length in self.lengths] for depth in self.depths]
        )

    def at(self, rope: str, length: int) -> list[Trial]:
        """Returns the trials of all depths."""
        return [trial for depth in self.depths for trial in self.cell(rope, length, depth)]


def rate(trials: Sequence[Trial]) -> float:
    """Returns the share of found keys."""
    return sum(trial.found for trial in trials) / len(trials)


def write_passkey_report(output: Target, result: PasskeyResult) -> None:
    """Writes passkey.csv, passkey.json, passkey.png and report.md, each as a whole."""
    grid = TrialGrid(result)
    write_csv(target_in(output, RATES), _rows(grid))
    content = {"asked": result.options, "trials": [asdict(trial) for trial in result.trials]}
    answers = json.dumps(json_value(content), indent=2, ensure_ascii=False)
    write_text(target_in(output, ANSWERS), answers + "\n")
    write_figure(target_in(output, FIGURE), figure(grid))
    write_text(target_in(output, REPORT), "\n".join(_lines(grid, result.options)) + "\n")


def table(result: PasskeyResult) -> Table:
    """Returns the rates by rope and length, for a terminal."""
    grid = TrialGrid(result)
    shown = Table("rope", *(f"{length:,}" for length in grid.lengths), "all", box=SIMPLE)
    for row in _rates(grid):
        shown.add_row(*row)
    return shown


def _rows(grid: TrialGrid) -> Iterator[Sequence[object]]:
    yield "rope", "length", "depth", "trials", "found", "rate"
    for rope in grid.ropes:
        for length in grid.lengths:
            for depth in grid.depths:
                cell = grid.cell(rope, length, depth)
                yield rope, length, depth, len(cell), sum(trial.found for trial in cell), rate(cell)


def _rates(grid: TrialGrid) -> Iterator[list[str]]:
    for rope in grid.ropes:
        by_length = [grid.at(rope, length) for length in grid.lengths]
        every = [trial for trials in by_length for trial in trials]
        yield [rope, *(f"{rate(trials):.0%}" for trials in [*by_length, every])]


def figure(grid: TrialGrid) -> Figure:
    """Draws the rates by length and depth, in one panel for each rope."""
    columns = min(PANELS, len(grid.ropes))
    rows = ceil_div(len(grid.ropes), columns)
    cell = 0.75  # inches
    size = 1.2 + max(2.2, cell * len(grid.lengths)), 1.1 + max(1.6, 0.6 * cell * len(grid.depths))
    drawn = Figure(figsize=(size[0] * columns + 0.8, size[1] * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for ax in axes.ravel()[len(grid.ropes) :]:
        ax.set_visible(False)
    for ax, rope in zip(axes.ravel(), grid.ropes, strict=False):
        rates = 100 * grid.rates(rope)
        image = ax.imshow(rates, cmap=matplotlib.colormaps["viridis"], vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(rates):
            colour = "black" if value > 55 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        ax.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths], fontsize=8)
        ax.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths], fontsize=8)
        ax.tick_params(length=0)
        ax.set_xlabel("Length (tokens)")
        ax.set_ylabel("Depth of the key")
        ax.set_title(plots.short(rope), fontsize=10, parse_math=False)
    bar = drawn.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Keys found (%)")
    bar.outline.set_visible(False)
    return drawn


def _lines(grid: TrialGrid, options: Mapping[str, object]) -> Iterator[str]:
    yield "# Pass keys\n"
    yield (
        f"A text of filler hides a number of five digits, and the model is asked for it: "
        f"{options['trials']} prompts for each length and depth, the same for every rope. A length includes "
        f"the {options['max_new_tokens']} tokens of the answer. The key is found if it is the first number "
        "of the answer.\n"
    )
    yield from markdown_table(
        ("keys found", *(f"{length:,}" for length in grid.lengths), "all"), list(_rates(grid))
    )
    yield f"\n![Keys found, by length and depth]({FIGURE})"
    for rope in grid.ropes:
        yield f"\n## {rope}\n"
        cells = [
            [f"{depth:.0%}", *(f"{value:.0%}" for value in row)]
            for depth, row in zip(grid.depths, grid.rates(rope), strict=True)
        ]
        yield from markdown_table(("depth", *(f"{length:,}" for length in grid.lengths)), cells)
    yield "\n## Ties\n"
    yield from _ties(grid)
    yield "\n## Failures\n"
    for rope in grid.ropes:
        yield from _failures(grid, rope)


def _ties(grid: TrialGrid) -> Iterator[str]:
    """Yields ropes that found equally many keys at a length, and their answers where only one was right."""
    none = True
    for length in grid.lengths:
        for one, other in combinations(grid.ropes, 2):
            pairs = list(zip(grid.at(one, length), grid.at(other, length), strict=True))
            if rate([a for a, _ in pairs]) != rate([b for _, b in pairs]):
                continue
            none = False
            apart = [(a, b) for a, b in pairs if a.found != b.found]
            count = sum(a.found for a, _ in pairs)
            which = ", but not the same:\n" if apart else ", the same."
            yield f"- {length:,} tokens, {one} and {other}: {count} of {len(pairs)} each{which}"
            if apart:
                rows = [(f"{a.depth:.0%}", a.key, _shown(a), _shown(b)) for a, b in apart]
                yield from markdown_table(("depth", "key", one, other), rows)
                yield ""
    if none:
        yield "No two ropes found equally many keys at any length."


def _failures(grid: TrialGrid, rope: str) -> Iterator[str]:
    wrong = [trial for trial in grid.trials if trial.rope == rope and not trial.found]
    total = sum(trial.rope == rope for trial in grid.trials)
    yield f"\n### {rope}: {len(wrong)} of {total}\n"
    if not wrong:
        return
    yield from markdown_table(
        ("length", "depth", "key", "answer", ""),
        [
            (
                f"{trial.length:,}",
                f"{trial.depth:.0%}",
                trial.key,
                _shown(trial),
                "names the key after another number" if trial.key in trial.answer else "",
            )
            for trial in wrong[:LISTED]
        ],
    )
    if len(wrong) > LISTED:
        yield f"\nAnd {len(wrong) - LISTED} more, in {ANSWERS}."


def _shown(trial: Trial) -> str:
    """Returns an answer in quotes, with escaped line breaks."""
    text = trial.answer
    return json.dumps(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…", ensure_ascii=False)
