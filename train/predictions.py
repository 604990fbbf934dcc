"""A model's predictions, and its errors among them."""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

LISTED = 10
"""How many errors, and how many confusions, a report lists."""


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions for the rows of one split.

    Their form depends on the task. single_label_classification: class ids [B]; multi_label_classification:
    0 or 1 [B, C]; regression: values [B, C] or [B]; token-classification: a list of tags for each sentence.
    """

    split: str
    labels: Any
    predicted: Any
    scores: Any
    """The model's confidence in each prediction, 0 to 1; None for a regression."""
    places: Sequence[str] | None = None
    """The file and line that each row was read from."""


class Mistake(NamedTuple):
    """A wrong prediction; `score` is the model's confidence or, for a regression, the error."""

    place: str
    true: str
    predicted: str
    score: float


class ConfusedPair(NamedTuple):
    """A class that was predicted for another one; `share` is the part of the class `true`."""

    true: str
    predicted: str
    times: int
    share: float


def mistakes(task: str, rows: Predictions, names: Sequence[str]) -> list[Mistake]:
    """Returns the most confident errors; for a regression, the greatest ones."""
    worst = heapq.nlargest(
        LISTED, _wrong(task, rows), key=lambda error: math.inf if math.isnan(error[0]) else error[0]
    )
    return [
        Mistake(
            _place(task, rows, row, column, names),
            _text(task, rows.labels, row, column, names),
            _text(task, rows.predicted, row, column, names),
            score,
        )
        for score, row, column in worst
    ]


def _wrong(task: str, rows: Predictions) -> Iterator[tuple[float, int, int]]:
    """Yields score, row and column of every wrong prediction."""
    if task == "token-classification":
        sentences = zip(rows.labels, rows.predicted, rows.scores, strict=True)
        for row, sentence in enumerate(sentences):
            for column, (true, predicted, score) in enumerate(zip(*sentence, strict=True)):
                if true != predicted:
                    yield float(score), row, column
        return
    labels, predicted = columns(rows.labels), columns(rows.predicted)
    scores = np.abs(labels - predicted) if task == "regression" else columns(rows.scores)
    for row, column in zip(*np.nonzero(labels != predicted), strict=True):
        yield float(scores[row, column]), int(row), int(column)


def columns(values: Any) -> np.ndarray:
    """Returns values of shape [B] or [B, C] as [B, C]."""
    values = np.asarray(values)
    return values[:, None] if values.ndim == 1 else values


def _place(task: str, rows: Predictions, row: int, column: int, names: Sequence[str]) -> str:
    place = f"row {row + 1}" if rows.places is None else str(rows.places[row])
    if task == "token-classification":
        return f"{place}, word {column + 1}"
    return f"{place}, {names[column]}" if task == "regression" and len(names) > 1 else place


def _text(task: str, values: Any, row: int, column: int, names: Sequence[str]) -> str:
    if task == "token-classification":
        return values[row][column]
    value = columns(values)[row, column]
    if task == "regression":
        return f"{value:.4g}"
    if task == "multi_label_classification":
        return names[column] if value else f"not {names[column]}"
    return names[value]


def class_ids(task: str, tags: Any, names: Sequence[str]) -> Int[np.ndarray, "n"]:
    """Returns labels or predictions of one class as ids; the words of all sentences are concatenated."""
    if task != "token-classification":
        return np.asarray(tags)
    ids = {name: number for number, name in enumerate(names)}
    return np.array([ids[tag] for sentence in tags for tag in sentence], np.int64)


def confused_pairs(counts: Int[np.ndarray, "C C"], names: Sequence[str]) -> list[ConfusedPair]:
    """Returns the most frequent confusions of a confusion matrix."""
    wrong = counts - np.diag(np.diag(counts))
    support = counts.sum(axis=1)
    pairs = [
        ConfusedPair(
            names[true],
            names[predicted],
            int(wrong[true, predicted]),
            float(wrong[true, predicted] / support[true]),
        )
        for true, predicted in zip(*np.nonzero(wrong), strict=True)
    ]
    return heapq.nlargest(LISTED, pairs, key=lambda pair: pair.times)
