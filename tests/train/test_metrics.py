"""Metrics: cases counted by hand, undefined cases, and which values are better."""

import math
from typing import Any

import numpy as np
import pytest
from phi3_jax.train.metrics import (
    METRICS,
    ClassScores,
    classification_table,
    confusion,
    direction,
    entity_table,
    language_metrics,
    predict,
    sequence_metrics,
    token_metrics,
)

# Four rows: class 0 is predicted as 0 and as 1, class 1 twice as 1. Class 2 does not occur.
LABELS = np.array([0, 0, 1, 1])
LOGITS = np.array([[2, 1, 0], [0, 3, 1], [-1, 0, -2], [0, 5, 0]], np.float32)


def test_single_label() -> None:
    values = sequence_metrics("single_label_classification", LOGITS, LABELS)
    # Class 0: precision 1, recall 1/2; class 1: precision 2/3, recall 1.
    assert values["accuracy"] == pytest.approx(3 / 4)
    assert values["micro_f1"] == pytest.approx(3 / 4)
    assert values["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    # (TP x TN - FP x FN) / sqrt(...) with TP = 1, FN = 1, FP = 0, TN = 2.
    assert values["matthews"] == pytest.approx(2 / math.sqrt(1 * 2 * 2 * 3))


def test_multi_label() -> None:
    # Row 0 is right, row 1 misses the last class, row 2 has one too many; a logit of 0 means no.
    labels = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    logits = np.array([[1.0, -1, -1], [-1, 2, 0], [3, -1, -1]])
    values = sequence_metrics("multi_label_classification", logits, labels)
    assert values["accuracy"] == pytest.approx(1 / 3)
    # Two right, one too many, one missed: micro F1 is 2/3; by class 2/3, 1 and, never predicted, 0.
    assert values["micro_f1"] == pytest.approx(2 / 3)
    assert values["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_regression() -> None:
    true = np.array([1.0, 2, 3, 4])
    predicted = np.array([[2.0], [4], [6], [20]])
    values = sequence_metrics("regression", predicted, true)
    assert values["mse"] == pytest.approx((1 + 4 + 9 + 256) / 4)
    assert values["mae"] == pytest.approx((1 + 2 + 3 + 16) / 4)
    # Deviations (-6, -4, -2, 12) and (-1.5, -0.5, 0.5, 1.5).
    assert values["pearson"] == pytest.approx((9 + 2 - 1 + 18) / math.sqrt(200 * 5))
    assert values["spearman"] == pytest.approx(1)


def test_regression_of_several_outputs_has_their_means() -> None:
    true = np.array([[1.0, 1], [2, 2], [3, 3]])
    predicted = np.array([[1.0, 3], [2, 2], [3, 1]])
    values = sequence_metrics("regression", predicted, true)
    assert values["mse"] == pytest.approx((0 + 8 / 3) / 2)
    assert values["pearson"] == pytest.approx(0)
    assert values["spearman"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("predicted", "true"),
    [([[2.0]] * 3, [1.0, 2, 3]), ([[1.0], [2], [3]], [5.0] * 3), ([[1.0]], [2.0]), ([[1e9]] * 2, [1.0, 2])],
)
def test_undefined_correlations_are_zero(predicted: Any, true: Any) -> None:
    values = sequence_metrics("regression", np.array(predicted), np.array(true))
    assert values["pearson"] == values["spearman"] == 0
    assert values["mse"] > 0


def test_metrics_of_nan_predictions_are_nan() -> None:
    values = sequence_metrics("regression", np.array([[1.0], [math.nan]]), np.array([1.0, 2]))
    assert set(values) == {"mse", "mae", "pearson", "spearman"}
    assert all(map(math.isnan, values.values()))


@pytest.mark.parametrize("task", sorted(METRICS))
def test_measures_the_metrics_of_the_table(task: str) -> None:
    measured: dict[str, float]
    if task == "causal-lm":
        measured = language_metrics(3.0, 2)
    elif task == "token-classification":
        measured = token_metrics([["O"]], [["O"]])
    else:
        labels = LABELS if task == "single_label_classification" else np.eye(4, 3)
        measured = sequence_metrics(task, LOGITS, labels)
    assert measured.keys() | {"loss"} == METRICS[task].keys()
    assert all(type(value) is float for value in measured.values())


def test_labels_of_one_class() -> None:
    values = sequence_metrics("single_label_classification", LOGITS[:1], LABELS[:1])
    assert values == {"accuracy": 1, "macro_f1": 1, "micro_f1": 1, "matthews": 0}
    none = np.zeros((2, 3))
    assert sequence_metrics("multi_label_classification", none, none)["macro_f1"] == 0


def test_predictions_and_their_probabilities() -> None:
    ids, confidences = predict("single_label_classification", np.log([[0.2, 0.5, 0.3], [0.9, 0.06, 0.04]]))
    np.testing.assert_array_equal(ids, [1, 0])
    assert confidences == pytest.approx(np.array([0.5, 0.9]))
    both, confidences = predict("multi_label_classification", np.array([[math.log(3), -math.log(4)]]))
    np.testing.assert_array_equal(both, [[1, 0]])
    assert confidences == pytest.approx(np.array([[0.75, 0.8]]))
    values, confidences = predict("regression", np.array([[1.5]]))
    assert (values.item(), confidences) == (1.5, None)
    with pytest.raises(ValueError, match="'ranking' is unknown; use regression, single_label_classification"):
        predict("ranking", LOGITS)


@pytest.mark.parametrize(
    ("true", "predicted", "expected"),
    [
        # An end too early costs precision and recall; the other entity is right.
        ("B-PER I-PER I-PER O B-LOC", "B-PER I-PER O O B-LOC", (1 / 2, 1 / 2, 1 / 2, 4 / 5)),
        # For conlleval an I- after O starts an entity.
        ("O B-LOC I-LOC", "O I-LOC I-LOC", (1, 1, 1, 2 / 3)),
        # A second B- starts a second entity.
        ("B-LOC B-LOC O", "B-LOC I-LOC O", (0, 0, 0, 2 / 3)),
        # An I- of another type starts an entity of that type.
        ("B-PER B-LOC", "B-PER I-LOC", (1, 1, 1, 1 / 2)),
        # The right words with the wrong type are wrong.
        ("B-PER O O", "B-ORG O B-PER", (0, 0, 0, 1 / 3)),
        # One of two entities, and no other.
        ("B-PER O B-ORG I-ORG", "B-PER O O O", (1, 1 / 2, 2 / 3, 2 / 4)),
        # No entities and none predicted.
        ("O O", "O O", (0, 0, 0, 1)),
        # Tags of words, such as parts of speech, are entities of one word.
        ("NOUN VERB OTHER OTHER", "NOUN NOUN OTHER OTHER", (3 / 4, 3 / 4, 3 / 4, 3 / 4)),
    ],
)
def test_counts_entities_as_conlleval_does(true: str, predicted: str, expected: tuple[float, ...]) -> None:
    values = token_metrics([true.split()], [predicted.split()])
    assert tuple(values.values()) == pytest.approx(expected)
    assert list(values) == ["precision", "recall", "f1", "accuracy"]


def test_an_entity_ends_with_its_sentence() -> None:
    true = [["O", "B-PER"], ["I-PER", "O"]]
    assert token_metrics(true, [["O", "B-PER"], ["B-PER", "O"]])["f1"] == 1
    assert entity_table(true, true) == [ClassScores("PER", 1, 1, 1, 2)]


def test_entities_by_type() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    predicted = [["B-PER", "I-PER", "B-ORG", "B-LOC"], ["O", "O"]]
    assert entity_table(true, predicted) == [
        ClassScores("LOC", 1, 1 / 2, pytest.approx(2 / 3), 2),
        ClassScores("ORG", 0, 0, 0, 0),
        ClassScores("PER", 1, 1, 1, 1),
    ]
    assert entity_table([["O"]], [["O"]]) == []


def test_language() -> None:
    values = language_metrics(total_loss=6 * math.log(5), tokens=6)
    assert values == {"loss": pytest.approx(math.log(5)), "perplexity": pytest.approx(5)}
    assert language_metrics(1e6, 1)["perplexity"] == math.inf
    assert math.isnan(language_metrics(math.nan, 1)["perplexity"])
    with pytest.raises(ValueError, match="tokens=0 were predicted"):
        language_metrics(0.0, 0)


def test_table_of_classes() -> None:
    names = ["no", "yes", "never seen"]
    assert classification_table(LABELS, LOGITS.argmax(1), names) == [
        ClassScores("no", 1, 1 / 2, pytest.approx(2 / 3), 2),
        ClassScores("yes", pytest.approx(2 / 3), 1, pytest.approx(4 / 5), 2),
        ClassScores("never seen", 0, 0, 0, 0),
    ]
    several = classification_table(np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]]), names[:2])
    assert several == [
        ClassScores("no", 1, 1 / 2, pytest.approx(2 / 3), 2),
        ClassScores("yes", 1 / 2, 1, pytest.approx(2 / 3), 1),
    ]


def test_confusion_has_true_classes_as_rows() -> None:
    counts = confusion(LABELS, LOGITS.argmax(1), ["no", "yes", "never seen"])
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert confusion(np.zeros(3, int), np.zeros(3, int), ["only"]) == [[3]]


def test_direction() -> None:
    assert direction("single_label_classification", "accuracy") == 1
    assert direction("regression", "mse") == -1
    assert all(direction(task, "loss") == -1 for task in METRICS)
    with pytest.raises(ValueError, match=r"'f1' is not measured for causal-lm; use loss, perplexity$"):
        direction("causal-lm", "f1")
    with pytest.raises(ValueError, match="task='ranking' has no metrics; use single_label"):
        direction("ranking", "loss")
