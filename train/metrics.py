"""The metrics of each task, computed by scikit-learn, SciPy and seqeval.

A task here is "causal-lm", "token-classification" or, for sequence classification, the problem type.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special, stats
from seqeval.metrics import sequence_labeling
from sklearn import metrics as sklearn_metrics

from phi3_jax.config.model_checks import PROBLEM_TYPES
from phi3_jax.errors import UserError

METRICS: dict[str, dict[str, int]] = {
    "single_label_classification": {"loss": -1, "accuracy": 1, "macro_f1": 1, "micro_f1": 1, "matthews": 1},
    "multi_label_classification": {"loss": -1, "accuracy": 1, "macro_f1": 1, "micro_f1": 1},
    "regression": {"loss": -1, "mse": -1, "mae": -1, "pearson": 1, "spearman": 1},
    "token-classification": {"loss": -1, "precision": 1, "recall": 1, "f1": 1, "accuracy": 1},
    "causal-lm": {"loss": -1, "perplexity": -1},
}
"""Task -> metric -> 1 if greater is better, -1 if less is."""

_SCHEME_PREFIXES = ("B-", "I-", "E-", "S-")
_SCHEME_TAGS = ("O", "B", "I", "E", "S")


class ClassScores(NamedTuple):
    """The scores of one class or one type of entity; `support` is its count among the labels."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def direction(task: str, name: str) -> int:
    """Returns 1 if a greater value of this metric is better, -1 if a smaller one is.

    Raises:
        UserError: the task or the metric is unknown; the message lists the known ones.
    """
    if task not in METRICS:
        raise UserError(f"task={task!r} has no metrics; use {', '.join(METRICS)}")
    if name not in METRICS[task]:
        raise UserError(f"metric {name!r} is not measured for {task}; use {', '.join(METRICS[task])}")
    return METRICS[task][name]


def predict(
    problem_type: str, logits: Float[np.ndarray, "B C"]
) -> tuple[np.ndarray, Float[np.ndarray, "..."] | None]:
    """Returns a classifier's predictions and the probabilities that it gives them.

    single_label_classification: class ids [B] and probabilities [B]; multi_label_classification: 0 or 1
    [B, C] and probabilities [B, C]; regression: the logits and None.

    Raises:
        UserError: the problem type is unknown.
    """
    logits = np.asarray(logits, np.float64)
    if problem_type == "single_label_classification":
        return logits.argmax(axis=-1), special.softmax(logits, axis=-1).max(axis=-1)
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(np.int64), special.expit(np.abs(logits))
    if problem_type == "regression":
        return logits, None
    raise UserError(f"problem_type={problem_type!r} is unknown; use {', '.join(PROBLEM_TYPES)}")


def sequence_metrics(
    problem_type: str, logits: Float[np.ndarray, "B C"], labels: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of sequence classification, without the loss.

    F1 is 0 where it would be 0 / 0. With one label for each row, the macro average is over the classes that
    occur in labels or predictions; with several, over all classes. Correlations are means over the outputs;
    one that is not defined (a constant side, fewer than two rows) counts as 0. If a regression's predictions
    are not finite, all its metrics are NaN.

    Args:
        problem_type: of the classifier.
        logits: of each row.
        labels: class ids [B]; 0 or 1 [B, C]; or targets, [B, C] or [B] with one output.

    Raises:
        UserError: the problem type is unknown.
    """
    predicted, _ = predict(problem_type, logits)
    if problem_type == "regression":
        return _regression(predicted, np.asarray(labels, np.float64).reshape(predicted.shape))
    values = {"accuracy": float(sklearn_metrics.accuracy_score(labels, predicted))}
    for average in ("macro", "micro"):
        f1 = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        values[f"{average}_f1"] = float(f1)
    if problem_type == "single_label_classification":
        with _allowing_one_class():
            values["matthews"] = float(sklearn_metrics.matthews_corrcoef(labels, predicted))
    return values


def _regression(predicted: Float[np.ndarray, "B C"], true: Float[np.ndarray, "B C"]) -> dict[str, float]:
    if not np.isfinite(predicted).all():
        return dict.fromkeys(("mse", "mae", "pearson", "spearman"), math.nan)
    outputs = list(zip(predicted.T, true.T, strict=True))
    return {
        "mse": float(sklearn_metrics.mean_squared_error(true, predicted)),
        "mae": float(sklearn_metrics.mean_absolute_error(true, predicted)),
        "pearson": float(np.mean([_correlation(stats.pearsonr, *both) for both in outputs])),
        "spearman": float(np.mean([_correlation(stats.spearmanr, *both) for both in outputs])),
    }


def _correlation(
    function: Callable[..., Any], predicted: Float[np.ndarray, "B"], true: Float[np.ndarray, "B"]
) -> float:
    if len(true) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of a constant side: the result is 0
        value = float(function(predicted, true).statistic)
    return 0.0 if math.isnan(value) else value


def token_metrics(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns precision, recall and F1 of whole entities as conlleval counts them, and accuracy of tags.

    A tag outside the schemes (neither O nor with a prefix B-, I-, E- or S-) is an entity of one word.
    """
    true, predicted = _in_scheme(true), _in_scheme(predicted)
    precision, recall, f1, _ = sequence_labeling.precision_recall_fscore_support(
        true, predicted, average="micro", zero_division=0
    )
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "accuracy": float(sequence_labeling.accuracy_score(true, predicted)),
    }


def _in_scheme(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    def fits(tag: str) -> bool:
        return tag in _SCHEME_TAGS or tag.startswith(_SCHEME_PREFIXES)

    return [[tag if fits(tag) else f"S-{tag}" for tag in tags] for tags in sentences]


def language_metrics(total_loss: float, tokens: int) -> dict[str, float]:
    """Returns the loss of a token and the perplexity, from the summed loss of `tokens` predicted tokens.

    Raises:
        UserError: no token was predicted.
    """
    if tokens <= 0:
        raise UserError(f"tokens={tokens} were predicted; a loss needs at least one label that counts")
    loss = float(total_loss) / tokens
    with np.errstate(over="ignore"):
        return {"loss": loss, "perplexity": float(np.exp(np.float64(loss)))}


def classification_table(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> list[ClassScores]:
    """Returns the scores of every class, in the order of `names`, from class ids [B] or 0 and 1 [B, C]."""
    scores = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(len(names)), average=None, zero_division=0
    )
    return _table(names, scores)


def entity_table(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[ClassScores]:
    """Returns the scores of every type of entity that occurs, by name, counted as in `token_metrics`."""
    true, predicted = _in_scheme(true), _in_scheme(predicted)
    names = {name for tags in (*true, *predicted) for name, *_ in sequence_labeling.get_entities(tags)}
    scores = sequence_labeling.precision_recall_fscore_support(true, predicted, average=None, zero_division=0)
    return _table(sorted(names), scores)


def _table(names: Sequence[str], scores: Sequence[np.ndarray]) -> list[ClassScores]:
    return [
        ClassScores(name, float(precision), float(recall), float(f1), int(support))
        for name, precision, recall, f1, support in zip(names, *scores, strict=True)
    ]


def confusion(
    labels: Int[np.ndarray, "B"], predicted: Int[np.ndarray, "B"], names: Sequence[str]
) -> Int[np.ndarray, "C C"]:
    """Returns how often each class (row) was predicted as each class (column)."""
    with _allowing_one_class():
        return sklearn_metrics.confusion_matrix(labels, predicted, labels=range(len(names)))


@contextmanager
def _allowing_one_class() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")
        yield
