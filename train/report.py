"""The report on a run: report.md for people, metrics.json for programs, and figures."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from phi3_jax.runs import plots
from phi3_jax.runs.files import write_text
from phi3_jax.runs.json_values import json_value
from phi3_jax.runs.tables import markdown_table

from .metrics import ClassScores, classification_table, confusion, entity_table
from .predictions import ConfusedPair, Mistake, Predictions, class_ids, columns, confused_pairs, mistakes

CURVES, CONFUSION, SCATTER = FIGURES = "curves.png", "confusion.png", "scatter.png"

TITLES = {
    "single_label_classification": "Sequence classification",
    "multi_label_classification": "Sequence classification with several labels",
    "regression": "Regression",
    "token-classification": "Token classification",
    "causal-lm": "Causal language modelling",
}


@dataclass(frozen=True)
class Results:
    """The results of a run."""

    metrics: Mapping[str, Mapping[str, float]]
    """Split -> metric -> value, for the parameters that were kept."""
    metric: str
    """The metric of the validation data that chose the parameters."""
    best_step: int | None
    """The step of the parameters; None: the last one."""
    predictions: Predictions | None = None
    """Those that the tables are about; None for a language model."""


@dataclass(frozen=True)
class _Findings:
    """The tables of the predictions, empty if the task has none."""

    classes: list[ClassScores]
    confused: list[ConfusedPair]
    mistakes: list[Mistake]


def write_report(
    directory: Path,
    *,
    task: str,
    settings: Mapping[str, Any],
    data: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
    results: Results,
    names: Sequence[str],
) -> None:
    """Writes report.md, metrics.json, curves.png and confusion.png or, for a regression, scatter.png.

    Each file is replaced as a whole; figures of an earlier report that this one lacks are removed.

    Args:
        directory: of the run.
        task: a key of `METRICS`.
        settings: of the run, with its command.
        data: counts, such as "train rows".
        log: from `read_log`.
        results: of the run.
        names: of classes, tags or outputs, by id; a language model has none, and a regression needs none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    findings, figures = _examine(task, results.predictions, names)
    figures[CURVES] = plots.curves(task, log, results.metric, results.best_step)
    for name in FIGURES:
        if name in figures:
            plots.save(figures[name], directory / name)
        else:
            (directory / name).unlink(missing_ok=True)
    summary = {
        "task": task,
        "metric": results.metric,
        "best_step": results.best_step,
        "metrics": results.metrics,
        "classes": [scores._asdict() for scores in findings.classes],
        "confused": [pair._asdict() for pair in findings.confused],
        "mistakes": [mistake._asdict() for mistake in findings.mistakes],
        "tokens_per_second": _speed(log),
        "input_wait": _input_wait(log),
        "data": data,
        "settings": settings,
    }
    text = json.dumps(json_value(summary), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(directory / "metrics.json", text + "\n")
    lines = _lines(task, settings, data, log, results, findings, list(figures))
    write_text(directory / "report.md", "\n".join(lines) + "\n")


def _examine(
    task: str, rows: Predictions | None, names: Sequence[str]
) -> tuple[_Findings, dict[str, Figure]]:
    """Returns the tables of the predictions, and the figures by the names of their files."""
    if rows is None:
        return _Findings([], [], []), {}
    if task == "regression":
        true, predicted = columns(rows.labels), columns(rows.predicted)
        names = names or [f"output {number}" for number in range(1, true.shape[1] + 1)]
        figure = plots.scatter(true, predicted, names)
        return _Findings([], [], mistakes(task, rows, names)), {SCATTER: figure}
    wrong = mistakes(task, rows, names)
    if task == "multi_label_classification":
        return _Findings(classification_table(rows.labels, rows.predicted, names), [], wrong), {}
    tokens = task == "token-classification"
    labels, predicted = (class_ids(task, tags, names) for tags in (rows.labels, rows.predicted))
    counts = confusion(labels, predicted, names)
    figures = {}
    if len(names) <= plots.MOST_CLASSES:
        figures[CONFUSION] = plots.confusion_matrix(counts, names, "Words" if tokens else "Rows")
    classes = (
        entity_table(rows.labels, rows.predicted)
        if tokens
        else classification_table(labels, predicted, names)
    )
    return _Findings(classes, confused_pairs(counts, names), wrong), figures


def _speed(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    speeds = [record["tokens_per_second"] for record in log if "tokens_per_second" in record]
    if not speeds:
        return {}
    return {"slowest": min(speeds), "median": statistics.median(speeds), "fastest": max(speeds)}


def _input_wait(log: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the mean share of the time that the devices waited for batches."""
    shares = [record["input_wait"] for record in log if "input_wait" in record]
    return statistics.fmean(shares) if shares else None


def _lines(
    task: str,
    settings: Mapping[str, Any],
    data: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
    results: Results,
    findings: _Findings,
    figures: Sequence[str],
) -> Iterator[str]:
    yield f"# {TITLES[task]}: report on a run"
    last = max((record["step"] for record in log), default=0)
    if results.best_step is None:
        yield f"\nThe parameters kept are those of the last step, {last:,}."
    else:
        yield (
            f"\nThe parameters kept are those of step {results.best_step:,} of {last:,}, the best by "
            f"`{results.metric}` on the validation data."
        )
    yield "\n## Metrics\n"
    measured = dict.fromkeys(name for values in results.metrics.values() for name in values)
    yield from markdown_table(
        ("metric", *results.metrics),
        [(name, *(_number(split.get(name)) for split in results.metrics.values())) for name in measured],
    )
    yield "\n![Loss, metric and learning rate against the step](curves.png)"
    if results.predictions is not None:
        yield from _findings(task, results.predictions.split, findings, figures)
    if speed := _speed(log):
        yield "\n## Speed\n"
        yield from markdown_table(
            ("tokens/s", ""), [(name, f"{value:,.0f}") for name, value in speed.items()]
        )
        if (wait := _input_wait(log)) is not None:
            yield f"\nThe devices waited for their batches {wait:.1%} of the time."
    yield "\n## Data\n"
    yield from markdown_table(("", "count"), [(name, f"{count:,}") for name, count in data.items()])
    yield "\n## Settings\n"
    yield from markdown_table(
        ("setting", "value"), [(name, _text(value)) for name, value in settings.items()]
    )


def _findings(task: str, split: str, findings: _Findings, figures: Sequence[str]) -> Iterator[str]:
    if findings.classes:
        title = "Entities" if task == "token-classification" else "Classes"
        yield f"\n## {title} of the {split} data, worst first\n"
        worst_first = sorted(findings.classes, key=lambda scores: scores.f1)
        yield from markdown_table(
            ("name", "precision", "recall", "F1", "support"),
            [(one.name, *(f"{x:.4f}" for x in one[1:4]), f"{one.support:,}") for one in worst_first],
        )
    if CONFUSION in figures:
        yield "\n![Confusion matrix](confusion.png)"
    if SCATTER in figures:
        yield "\n![Predicted against true values](scatter.png)"
    if findings.confused:
        yield f"\n## Most frequent confusions in the {split} data\n"
        yield from markdown_table(
            ("true", "predicted", "count", "share of the true class"),
            [
                (pair.true, pair.predicted, f"{pair.times:,}", f"{100 * pair.share:.1f}%")
                for pair in findings.confused
            ],
        )
    if findings.mistakes:
        regression = task == "regression"
        yield f"\n## {'Greatest' if regression else 'Most confident'} errors in the {split} data\n"
        yield from markdown_table(
            ("place", "true", "predicted", "error" if regression else "confidence"),
            [
                (*one[:3], _number(one.score) if regression else f"{100 * one.score:.1f}%")
                for one in findings.mistakes
            ],
        )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(json_value(value), ensure_ascii=False)
