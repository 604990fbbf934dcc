"""The labels of a run: by name from the base's head, in a given order, and those that the model lacks."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from marks import slow
from phi3_jax.train.labels import base_head
from phi3_jax.train.recipe import make_recipe, new_model
from phi3_jax.train.sources import Data, load_data
from runs import run, settings_of, write_base, write_rows

from phi3_jax import Phi3ForSequenceClassification, Phi3ForTokenClassification
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.data.rows import BadRowError
from phi3_jax.tokenizer import Phi3Tokenizer

CLASSES = {
    "sequence-classification": Phi3ForSequenceClassification,
    "token-classification": Phi3ForTokenClassification,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=1)


def classifier(folder: Path, base: Path, *names: str, task: str = "sequence-classification") -> Path:
    """Writes a classifier whose head has these labels."""
    model = CLASSES[task].from_pretrained(base, id2label=dict(enumerate(names)), rngs=7)
    model.save_pretrained(folder / "classifier")
    shutil.copy(base / "tokenizer.json", folder / "classifier")
    return folder / "classifier"


def write(path: Path, *labels: Any) -> Path:
    lines = [json.dumps({"text": f"rain {n}", "label": label}) for n, label in enumerate(labels)]
    path.write_text("\n".join(lines) + "\n")
    return path


def heads(folder: Path, model: Path, **changes: Any) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Returns the labels of a new run, its head before the first step, and the base's head."""
    recipe = make_recipe(settings_of(folder, model, **changes), None, None)
    assert recipe.data.labels is not None
    ours, theirs = (jax.tree.leaves(each.score)[-1] for each in (new_model(recipe, None), loaded(model)))
    return recipe.data.labels.names, np.asarray(ours), np.asarray(theirs)


def loaded(model: Path) -> Any:
    (name,) = json.loads((model / "config.json").read_text())["architectures"]
    return {cls.__name__: cls for cls in CLASSES.values()}[name].from_pretrained(model)


def test_keeps_the_order_of_the_base(tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier(tmp_path, base, "spam", "ham", "mail")
    write(tmp_path / "train.jsonl", *["ham", "mail", "spam", "mail"] * 4)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        names, ours, theirs = heads(tmp_path, model)
    assert names == ("spam", "ham", "mail")
    np.testing.assert_array_equal(ours, theirs)
    assert "head" not in caplog.text
    names, ours, theirs = heads(tmp_path, model, labels=["mail", "spam", "ham"])
    assert names == ("mail", "spam", "ham")
    np.testing.assert_array_equal(ours, theirs[[2, 0, 1]])


@pytest.mark.parametrize("others", [["no", "yes"], ["ham", "spam", "mail"], ["spam"] * 3 + ["yes"]])
def test_other_names_have_a_new_head(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, others: list[str]
) -> None:
    model = classifier(tmp_path, base, "spam", "ham")
    write(tmp_path / "train.jsonl", *others * 4)
    with caplog.at_level(logging.WARNING):
        names, ours, theirs = heads(tmp_path, model)
    assert names == tuple(sorted(set(others)))
    assert not np.isin(ours, theirs).any()
    assert "head is for classes of 'spam', 'ham', and the rows are for classes of" in caplog.text


@pytest.mark.parametrize(
    ("labels", "changes", "kept"),
    [
        ([0, 1], {}, True),
        (["no", "yes"], {}, False),
        (["no", "yes"], {"labels": ["yes", "no"]}, True),
        (["no", "yes"], {"labels": ["yes", "no", "perhaps"]}, False),
        (["1", "2"], {}, False),
    ],
)
def test_a_head_without_names_fits_numbers_and_a_given_order(
    tmp_path: Path, base: Path, labels: list[Any], changes: dict[str, Any], kept: bool
) -> None:
    model = classifier(tmp_path, base, "LABEL_0", "LABEL_1")
    write(tmp_path / "train.jsonl", *labels * 4)
    names, ours, theirs = heads(tmp_path, model, **changes)
    assert names == tuple(changes.get("labels", map(str, labels)))
    assert np.array_equal(ours, theirs) == kept


def test_a_head_for_another_task_is_new(tmp_path: Path, base: Path) -> None:
    model = classifier(tmp_path, base, "a", "b", task="token-classification")
    write_rows(tmp_path / "train.jsonl")
    names, ours, theirs = heads(tmp_path, model)
    assert names == ("a", "b")
    assert not np.isin(ours, theirs).any()


def data(folder: Path, base: Path, **changes: Any) -> Data:
    checkpoint = open_checkpoint(base)
    settings = settings_of(folder, base, **changes)
    tokenizer = Phi3Tokenizer.from_pretrained(base)
    return load_data(settings, tokenizer, checkpoint.config, base_head(checkpoint))


@pytest.mark.parametrize("kind", ["single", "several", "tags"])
def test_warns_of_labels_that_no_validation_row_has(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    task = "token-classification" if kind == "tags" else "sequence-classification"
    write_rows(tmp_path / "train.jsonl", task=task)
    odd = {"single": {"label": "c"}, "several": {"label": ["a", "c"]}, "tags": {"labels": ["O", "c"]}}
    rare = {"text": "rain", "words": ["rain", "sun"]} | odd[kind]
    whole = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(whole + json.dumps(rare) + "\n")
    problem = "multi_label_classification" if kind == "several" else "single_label_classification"
    data(tmp_path, base, task=task, problem_type=problem)
    assert "no validation row has the label 'c': too few rows have it for validation_frac" in caplog.text
    caplog.clear()
    (tmp_path / "train.jsonl").write_text(whole + 2 * (json.dumps(rare) + "\n"))
    data(tmp_path, base, task=task, problem_type=problem)
    assert "no validation row" not in caplog.text


def test_rejects_rows_that_given_labels_lack(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "train.jsonl", "a", "b", "c")
    with pytest.raises(BadRowError, match=r"line 3: label 'c' is not one of the 2 labels: 'b', 'a'"):
        data(tmp_path, base, labels=["b", "a"])
    with pytest.raises(ValueError, match="labels are for classes"):
        data(tmp_path, base, labels=["b", "a"], problem_type="regression")
    columns = {"problem_type": "multi_label_classification", "label_column": ["x", "y"]}
    with pytest.raises(ValueError, match="the columns name the labels"):
        data(tmp_path, base, labels=["b", "a"], **columns)
    with pytest.raises(ValueError, match="expected at least two classes"):
        data(tmp_path, base, labels=["b"])


def test_labels_of_bad_rows_are_no_classes(tmp_path: Path, base: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip("abc ", "xyxz", strict=True)]
    lines.insert(1, json.dumps({"text": "\ud800", "label": "half"}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    loaded = data(tmp_path, base, skip_bad_rows=True)
    assert loaded.labels is not None
    assert loaded.labels.names == ("x", "y")
    assert loaded.counts["bad rows skipped"] == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "rows.jsonl",
            '[{"text": "a", "label": "x"}]\n',
            "line 1: .*object in each line, got .*an array; write",
        ),
        ("rows.json", '[\n{"text": "a", "label": "x"}\n]\n', "line 1: .*which starts an array; write"),
        ("rows.conll", "rain\nsun\n", "line 1: expected a word and its tag"),
        ("rows.csv", 'text,label\na,x\nb,x\n"c,x\nd,y\n', "line 4: unexpected end"),
        (
            "rows.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "text": "c", "label": "y"}\n',
            "line 2: .*twice",
        ),
        (
            "rows.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "", "label": "y"}\n',
            "line 2: .text. is empty",
        ),
    ],
)
def test_names_the_first_bad_row(tmp_path: Path, base: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    task = "token-classification" if name.endswith("conll") else "sequence-classification"
    with pytest.raises(BadRowError, match=rf"{name}, {words}"):
        data(tmp_path, base, train_file=str(tmp_path / name), task=task)


def test_says_which_rows_were_skipped_where_too_few_are_left(tmp_path: Path, base: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "", "label": "y"}\n')
    with pytest.raises(ValueError, match=r"the label 'x'; .*1 bad row was skipped; the first: .*line 2"):
        data(tmp_path, base, skip_bad_rows=True)
    (tmp_path / "train.jsonl").write_text("[\n]\n")
    with pytest.raises(ValueError, match=r"no labels; .*2 bad rows were skipped; the first: .*line 1"):
        data(tmp_path, base, skip_bad_rows=True)


UNKNOWN: dict[str, dict[str, Any]] = {
    "single": {"label": "never seen"},
    "several": {"label": ["a", "never seen"]},
    "tags": {"labels": ["O", "never seen"]},
}


@pytest.mark.parametrize("kind", ["single", *(slow(each) for each in ("tags", "several"))])
def test_test_rows_with_unknown_labels_count_as_wrong(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The loss is that of the other labels."""
    task = "token-classification" if kind == "tags" else "sequence-classification"
    write_rows(tmp_path / "train.jsonl", task=task)
    write_rows(tmp_path / "test.jsonl", 3, task=task)
    options: dict[str, Any] = {"task": task, "max_steps": 1, "learning_rate": 1e-12}
    if kind == "several":
        options["problem_type"] = "multi_label_classification"
    row = {"text": "rain", "words": ["rain", "sun"]} | UNKNOWN[kind]
    known = (tmp_path / "test.jsonl").read_text()
    (tmp_path / "known.jsonl").write_text(known)
    (tmp_path / "test.jsonl").write_text(known + json.dumps(row) + "\n")
    options |= {"validation_file": str(tmp_path / "known.jsonl"), "test_file": str(tmp_path / "test.jsonl")}
    with caplog.at_level(logging.WARNING):
        results = run(tmp_path, base, **options)
    without, found = results["validation"], results["test"]
    assert "test rows have labels that the model does not have: 'never seen' (1)." in caplog.text
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    if kind == "single":
        assert found["accuracy"] == pytest.approx(without["accuracy"] * 3 / 4)
        assert found["loss"] == pytest.approx(without["loss"], rel=1e-5)
        assert any(mistake["true"] == "never seen" for mistake in report["mistakes"])
    elif kind == "several":
        assert found["accuracy"] == pytest.approx(without["accuracy"] * 3 / 4)
        scores = {one["name"]: one for one in report["classes"]}
        assert (scores["never seen"]["recall"], scores["never seen"]["support"]) == (0, 1)
    else:
        assert found["accuracy"] < 1
        assert any(mistake["true"] == "never seen" for mistake in report["mistakes"])
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())["label2id"]) <= {
        "a",
        "b",
        "O",
        "B-thing",
    }
