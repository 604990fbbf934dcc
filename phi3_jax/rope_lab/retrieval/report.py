"""Results of retrieval tasks: scores in tables, a figure, every answer, and a report."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations, product

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from phi3_jax.evaluation.run_options import STATE
from phi3_jax.rope_lab.result_files import write_csv, write_figure
from phi3_jax.rope_lab.retrieval.figure import figure
from phi3_jax.rope_lab.retrieval.measure import Trial
from phi3_jax.rope_lab.retrieval.run import RetrievalResult
from phi3_jax.rope_lab.retrieval.scores import TrialGrid, score
from phi3_jax.runs.json_values import json_value
from phi3_jax.runs.tables import markdown_table
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

SCORES, ANSWERS, FIGURE, REPORT = "retrieval.csv", "retrieval.json", "retrieval.png", "report.md"
FILES = (SCORES, ANSWERS, FIGURE, REPORT, STATE)

LISTED = 100
"""The most failures of a rope in the report; the JSON file has all of them."""

SHOWN = 160
"""The most characters of an answer in the report."""

AVERAGE = "average"


def write_retrieval_report(output: Target, result: RetrievalResult) -> None:
    """Writes retrieval.csv, retrieval.json, retrieval.png and report.md, each as a whole."""
    grid = TrialGrid(result.trials)
    write_csv(target_in(output, SCORES), _rows(grid))
    content = {"asked": result.options, "trials": [asdict(trial) for trial in result.trials]}
    answers = json.dumps(json_value(content), indent=2, ensure_ascii=False)
    write_text(target_in(output, ANSWERS), answers + "\n")
    write_figure(target_in(output, FIGURE), figure(grid))
    write_text(target_in(output, REPORT), "\n".join(_lines(grid, result)) + "\n")


def table(result: RetrievalResult) -> Table:
    """Returns the scores by task, rope and length, for a terminal."""
    grid = TrialGrid(result.trials)
    shown = Table("task", "rope", *_lengths(grid), "all", box=SIMPLE)
    for task in grid.tasks:
        for rope in grid.ropes:
            shown.add_row(task, rope.replace("[", r"\["), *_percent(grid.scores(rope, task)))
    if len(grid.tasks) > 1:
        for rope in grid.ropes:
            shown.add_row(AVERAGE, rope.replace("[", r"\["), *_percent(grid.averages(rope)))
    return shown


def _lengths(grid: TrialGrid) -> list[str]:
    return [f"{length:,}" for length in grid.lengths]


def _percent(scores: Iterable[float]) -> list[str]:
    """Returns scores of all lengths and their mean; each length has as many trials."""
    values = list(scores)
    return [f"{value:.0%}" for value in [*values, float(np.mean(values))]]


def _depth(depth: float | None) -> str:
    return "" if depth is None else f"{depth:.0%}"


def _rows(grid: TrialGrid) -> Iterator[Sequence[object]]:
    yield "rope", "task", "length", "depth", "trials", "score"
    for rope, task, length in product(grid.ropes, grid.tasks, grid.lengths):
        for depth in grid.depths(task):
            cell = grid.cell(rope, task, length, depth)
            yield rope, task, length, depth, len(cell), score(cell)


def _lines(grid: TrialGrid, result: RetrievalResult) -> Iterator[str]:
    yield "# Retrieval\n"
    yield (
        f"A long text of filler hides lines, and the model is asked for what they hold: "
        f"{result.options['trials']} prompts for each length and depth, the same for every rope. A length "
        "includes the tokens of the answer. A score is the share of the right values that the answer has; "
        "as many of the answer's different values count as there are right ones, the first ones."
    )
    if len(grid.tasks) > 1:
        yield "\n## Average\n"
        head = ("mean of the tasks", *_lengths(grid), "all")
        yield from markdown_table(head, [(rope, *_percent(grid.averages(rope))) for rope in grid.ropes])
    for task in result.tasks:
        yield f"\n## {task.label}\n"
        yield f"{task.summary.capitalize()}.\n"
        yield from _scores(grid, task.name)
    yield f"\n![Scores by task, rope and length]({FIGURE})"
    yield "\n## Ties\n"
    yield from _ties(grid)
    yield "\n## Failures\n"
    for rope in grid.ropes:
        yield from _failures(grid, rope)


def _scores(grid: TrialGrid, task: str) -> Iterator[str]:
    yield from markdown_table(
        ("found", *_lengths(grid), "all"), [(rope, *_percent(grid.scores(rope, task))) for rope in grid.ropes]
    )
    if not grid.has_depth(task):
        return
    for rope in grid.ropes:
        yield f"\n### {task}, {rope}\n"
        cells = [
            [_depth(depth), *(f"{value:.0%}" for value in row)]
            for depth, row in zip(grid.depths(task), grid.scores_by_depth(rope, task), strict=True)
        ]
        yield from markdown_table(("depth", *_lengths(grid)), cells)


def _ties(grid: TrialGrid) -> Iterator[str]:
    """Yields ropes that have the same score at a length, and their answers where the scores differ."""
    none = True
    for task, length in product(grid.tasks, grid.lengths):
        for one, other in combinations(grid.ropes, 2):
            pairs = list(zip(grid.at(one, task, length), grid.at(other, task, length), strict=True))
            same = score([a for a, _ in pairs])
            if same != score([b for _, b in pairs]):
                continue
            none = False
            apart = [(a, b) for a, b in pairs if a.score != b.score]
            which = ", but not by the same answers:\n" if apart else ", on each prompt."
            yield f"- {task}, {length:,} tokens, {one} and {other}: {same:.0%} each{which}"
            if apart:
                rows = [(_depth(a.depth), ", ".join(a.answers), _shown(a), _shown(b)) for a, b in apart]
                yield from markdown_table(("depth", "right", one, other), rows)
                yield ""
    if none:
        yield "No two ropes have the same score at any length."


def _failures(grid: TrialGrid, rope: str) -> Iterator[str]:
    trials = [trial for trial in grid.trials if trial.rope == rope]
    wrong = [trial for trial in trials if trial.score < 1]
    yield f"\n### {rope}: {len(wrong)} of {len(trials)}\n"
    if not wrong:
        return
    yield from markdown_table(
        ("task", "length", "depth", "right", "answer", "found"),
        [
            (
                trial.task,
                f"{trial.length:,}",
                _depth(trial.depth),
                ", ".join(trial.answers),
                _shown(trial),
                _found(trial),
            )
            for trial in wrong[:LISTED]
        ],
    )
    if len(wrong) > LISTED:
        yield f"\nAnd {len(wrong) - LISTED} more, in {ANSWERS}."


def _found(trial: Trial) -> str:
    count = len(trial.answers)
    found = round(trial.score * count)
    later = sum(answer in trial.text for answer in trial.answers) > found
    return f"{found} of {count}" + (", more after other values" if later else "")


def _shown(trial: Trial) -> str:
    """Returns an answer in quotes, with escaped line breaks."""
    text = trial.text
    return json.dumps(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…", ensure_ascii=False)
