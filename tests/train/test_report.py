"""Reports: their files for each task, the numbers in them, and legible figures."""

import json
import math
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from phi3_jax.train.predictions import Predictions, confused_pairs, mistakes
from phi3_jax.train.report import Results, write_report

from phi3_jax.runs import plots

PNG = b"\x89PNG\r\n\x1a\n"
LABELS = np.array([0, 0, 0, 0, 1, 1])
PREDICTED = np.array([0, 1, 1, 0, 1, 0])
CONFIDENCES = np.array([0.9, 0.7, 0.95, 0.6, 0.99, 0.8])
TWO = Predictions("test", LABELS, PREDICTED, CONFIDENCES, [f"test.csv, line {n}" for n in range(2, 8)])


def log(metric: str, steps: int = 100) -> list[dict[str, Any]]:
    speed = [{"tokens_per_second": 100.0 + n, "input_wait": 0.25 * (n % 2)} for n in range(1, steps + 1)]
    train = [
        {"kind": "train", "step": n, "loss": 2 / n, "learning_rate": 1e-4 / n, **speed[n - 1]}
        for n in range(1, steps + 1)
    ]
    return train + [
        {"kind": "validation", "step": n, "loss": 2.5 / n, metric: 1 - 1 / n}
        for n in range(25, steps + 1, 25)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Returns a function that writes a report, and returns its text and its metrics.json."""

    def write(task: str, metric: str, names: list[str], rows: Predictions | None, **changes: Any) -> Any:
        metrics = {"validation": {"loss": 0.25, metric: 0.8125}, "test": {"loss": 0.5, metric: 0.75}}
        arguments: dict[str, Any] = {
            "settings": {
                "command": "phi3-jax finetune a|b",
                "rate": 1e-4,
                "clip": math.inf,
                "betas": (0.9, 0.99),
            },
            "data": {"train rows": 12345, "test rows": 6},
            "log": log(metric),
            "results": Results(metrics, metric, 75, rows),
        }
        write_report(tmp_path, task=task, names=names, **arguments | changes)
        summary = json.loads((tmp_path / "metrics.json").read_text())
        return (tmp_path / "report.md").read_text(), summary

    return write


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(PNG)
    return struct.unpack(">II", data[16:24])


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_two_classes(write: Any, tmp_path: Path) -> None:
    text, summary = write("single_label_classification", "accuracy", ["no", "yes"], TWO)
    assert files(tmp_path) == ["confusion.png", "curves.png", "metrics.json", "report.md"]
    for line in (
        "those of step 75 of 100, the best by `accuracy`",
        "| metric | validation | test |",
        "| accuracy | 0.8125 | 0.7500 |",
        "| no | 0.6667 | 0.5000 | 0.5714 | 4 |",
        "| yes | 0.3333 | 0.5000 | 0.4000 | 2 |",
        "| no | yes | 2 | 50.0% |",
        "| yes | no | 1 | 50.0% |",
        "| test.csv, line 4 | no | yes | 95.0% |",
        "| slowest | 101 |",
        "| median | 150 |",
        "| fastest | 200 |",
        "| train rows | 12,345 |",
        r"| command | phi3-jax finetune a\|b |",
        "| betas | [0.9, 0.99] |",
    ):
        assert line in text
    assert text.index("| yes | 0.3333") < text.index("| no | 0.6667")  # worst first
    assert summary["metrics"]["test"] == {"loss": 0.5, "accuracy": 0.75}
    assert (summary["task"], summary["metric"], summary["best_step"]) == (
        "single_label_classification",
        "accuracy",
        75,
    )
    assert summary["classes"][0] == {
        "name": "no",
        "precision": 2 / 3,
        "recall": 0.5,
        "f1": 4 / 7,
        "support": 4,
    }
    assert summary["confused"][0] == {"true": "no", "predicted": "yes", "times": 2, "share": 0.5}
    assert [one["place"][-1] for one in summary["mistakes"]] == ["4", "7", "3"]  # the most confident first
    assert summary["tokens_per_second"] == {"slowest": 101, "median": 150.5, "fastest": 200}
    assert summary["input_wait"] == 0.125
    assert "\nThe devices waited for their batches 12.5% of the time.\n" in text
    assert summary["settings"] == {
        "command": "phi3-jax finetune a|b",
        "rate": 1e-4,
        "clip": "inf",
        "betas": [0.9, 0.99],
    }


@pytest.mark.slow
def test_a_matrix_of_77_classes_is_legible(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, save = {}, plots.save

    def keep(figure: Figure, path: Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    names = [f"{n}_{'a_long_name_of_a_class_as_they_are'[: n % 35]}" for n in range(77)]
    labels = np.repeat(np.arange(77), 5)
    predicted = np.where(np.arange(labels.size) % 5 == 0, (labels * 7 + 1) % 77, labels)
    write(
        "single_label_classification", "accuracy", names, Predictions("test", labels, predicted, np.ones(385))
    )
    width, height = size(tmp_path / "confusion.png")
    assert min(width, height) > 77 * 30  # pixels for each class; a letter is at least 10 high
    assert max(width, height) < 5000

    ax = figures["confusion.png"].axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == names
    for labels_of_axis, ends in ((ax.get_yticklabels(), "y"), (ax.get_xticklabels(), "x")):
        boxes = sorted(
            (label.get_window_extent() for label in labels_of_axis), key=lambda b: getattr(b, f"{ends}0")
        )
        for one, following in pairwise(boxes):
            assert getattr(one, f"{ends}1") <= getattr(following, f"{ends}0") + 0.5  # no overlap


def test_the_matrix_has_percentages_of_each_true_class() -> None:
    figure = plots.confusion_matrix(
        np.array([[3, 1, 0], [0, 0, 0], [0, 400, 1]]), ["a$b$", "b", "c"], "Words"
    )
    ax = figure.axes[0]
    np.testing.assert_allclose(
        ax.images[0].get_array(), [[75, 25, 0], [0, 0, 0], [0, 100 * 400 / 401, 100 / 401]]
    )
    written = {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "75", (1, 0): "25", (1, 2): "100"}  # by column and row; none below 0.5%
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a$b$", "b", "c"]
    assert not any(label.get_parse_math() for label in (*ax.get_yticklabels(), *ax.get_xticklabels()))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Predicted class", "True class")


def test_draws_no_matrix_of_more_than_100_classes(write: Any, tmp_path: Path) -> None:
    write("single_label_classification", "accuracy", ["no", "yes"], TWO)
    names = [str(n) for n in range(101)]
    text, summary = write("single_label_classification", "accuracy", names, TWO)
    assert files(tmp_path) == ["curves.png", "metrics.json", "report.md"]  # the earlier matrix is gone
    assert "confusion.png" not in text
    assert len(summary["classes"]) == 101
    assert summary["confused"][0]["true"] == "0"


def test_several_labels(write: Any, tmp_path: Path) -> None:
    labels, predicted = np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]])
    rows = Predictions("validation", labels, predicted, np.array([[0.9, 0.6], [0.7, 0.8]]))
    text, summary = write("multi_label_classification", "micro_f1", ["late", "lost"], rows)
    assert files(tmp_path) == ["curves.png", "metrics.json", "report.md"]
    assert "| row 2 | late | not late | 70.0% |" in text
    assert "| row 1 | not lost | lost | 60.0% |" in text
    assert summary["classes"][0]["recall"] == 0.5


def test_regression(write: Any, tmp_path: Path) -> None:
    true = np.array([[1.0, 10], [2, 20], [3, 30]])
    rows = Predictions(
        "test", true, true + np.array([[0, 5], [-1, 0], [0.5, math.nan]]), None, ["a", "b", "c"]
    )
    text, summary = write("regression", "mse", ["warmth", "clarity"], rows)
    assert files(tmp_path) == ["curves.png", "metrics.json", "report.md", "scatter.png"]
    assert "## Greatest errors in the test data" in text
    assert "| a, clarity | 10 | 15 | 5.0000 |" in text
    assert [one["score"] for one in summary["mistakes"]] == ["nan", 5, 1, 0.5]
    assert (summary["classes"], summary["confused"]) == ([], [])
    panels = plots.scatter(rows.labels, rows.predicted, ["warmth", "clarity"]).axes
    assert [panel.get_title() for panel in panels] == ["warmth", "clarity"]
    np.testing.assert_array_equal(panels[0].collections[0].get_offsets(), [[1, 1], [2, 1], [3, 3.5]])
    np.testing.assert_array_equal(panels[1].collections[0].get_offsets(), [[10, 15], [20, 20]])


def test_labels_of_one_output_may_have_one_axis(write: Any, tmp_path: Path) -> None:
    rows = Predictions("test", np.array([1.0, 2.0]), np.array([[1.5], [2.0]]), None)
    text, _ = write("regression", "mse", [], rows)
    assert "| row 1 | 1 | 1.5 | 0.5000 |" in text
    assert "row 2" not in text


def test_token_classification(write: Any, tmp_path: Path) -> None:
    labels = [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]
    predicted = [["B-PER", "I-PER", "O"], ["B-PER", "B-LOC"]]
    rows = Predictions(
        "test", labels, predicted, [[0.9] * 3, [0.8, 0.6]], ["t.conll, line 1", "t.conll, line 5"]
    )
    text, summary = write("token-classification", "f1", ["O", "B-LOC", "B-PER", "I-PER"], rows)
    assert files(tmp_path) == ["confusion.png", "curves.png", "metrics.json", "report.md"]
    assert "## Entities of the test data, worst first" in text
    assert "| PER | 0.5000 | 1.0000 | 0.6667 | 1 |" in text
    assert "| t.conll, line 5, word 1 | B-LOC | B-PER | 80.0% |" in text
    assert "| O | B-LOC | 1 | 50.0% |" in text
    assert [one["name"] for one in summary["classes"]] == ["LOC", "PER"]


def test_language_model(write: Any, tmp_path: Path) -> None:
    text, summary = write("causal-lm", "perplexity", [], None)
    assert files(tmp_path) == ["curves.png", "metrics.json", "report.md"]
    assert "| perplexity | 0.8125 | 0.7500 |" in text
    assert summary["classes"] == summary["confused"] == summary["mistakes"] == []


def test_a_run_without_validation_or_log(write: Any, tmp_path: Path) -> None:
    results = Results({"test": {"loss": math.nan}}, "loss", None)
    text, summary = write("causal-lm", "loss", [], None, log=[], results=results, data={}, settings={})
    assert "those of the last step, 0" in text
    assert "## Speed" not in text
    assert summary["metrics"] == {"test": {"loss": "nan"}}
    assert size(tmp_path / "curves.png")[0] > 1000


def test_the_same_results_give_the_same_files(write: Any, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        write("single_label_classification", "accuracy", ["no", "yes"], TWO)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    settings = dict(matplotlib.rcParams)
    assert contents() == contents()
    assert dict(matplotlib.rcParams) == settings


def test_curves_show_the_numbers_of_the_log() -> None:
    loss, metric, rate = plots.curves("causal-lm", log("perplexity"), "perplexity", 75).axes
    smooth = loss.lines[1]
    assert smooth.get_label() == "train, mean of 4 records"
    assert smooth.get_xdata()[0] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert smooth.get_ydata()[0] == pytest.approx((2 + 1 + 2 / 3 + 2 / 4) / 4)
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), np.arange(1, 101))
    assert loss.lines[2].get_label() == "validation"
    np.testing.assert_allclose(loss.lines[2].get_ydata(), 2.5 / np.array([25, 50, 75, 100]))
    np.testing.assert_allclose(metric.lines[0].get_ydata(), 1 - 1 / np.array([25, 50, 75, 100]))
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 1e-4 / np.arange(1, 101))
    assert [ax.get_ylabel() for ax in (loss, metric, rate)] == ["Loss (nats)", "Perplexity", "Learning rate"]
    assert all(ax.lines[-1].get_xdata()[0] == 75 for ax in (loss, metric, rate))
    assert rate.get_xlabel() == "Step"


def test_curves_leave_out_numbers_that_are_not_finite(tmp_path: Path) -> None:
    broken = [
        {"kind": "train", "step": n, "loss": value} for n, value in enumerate([1.0, math.nan, math.inf, 0.5])
    ]
    figure = plots.curves("regression", broken, "loss", None)
    (ax,) = figure.axes
    assert ax.get_ylabel() == "Loss (squared error)"
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 1], [3, 0.5]])
    plots.save(plots.curves("regression", broken[1:3], "loss", None), tmp_path / "nothing.png")


def test_writes_names_in_any_script(write: Any, tmp_path: Path) -> None:
    names = ["日本語", "_a|b\n<c>"]
    text, summary = write("single_label_classification", "accuracy", names, TWO)
    assert "| 日本語 | 0.6667" in text
    assert r"| _a\|b &lt;c> | 0.3333" in text
    assert [one["name"] for one in summary["classes"]] == names


def test_lists_ten_errors_and_ten_confusions() -> None:
    names = [str(n) for n in range(20)]
    rows = Predictions("test", np.arange(20), (np.arange(20) + 1) % 20, np.linspace(0.1, 0.9, 20))
    listed = mistakes("single_label_classification", rows, names)
    assert [one.true for one in listed] == [str(n) for n in range(19, 9, -1)]
    counts = np.diag(np.arange(1, 20), 1) + 100 * np.eye(20, dtype=int)
    assert [pair.times for pair in confused_pairs(counts, names)] == list(range(19, 9, -1))
