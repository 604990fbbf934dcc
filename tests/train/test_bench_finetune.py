"""`phi3-jax bench-finetune`: both sides have the same losses and metrics, for every task and setting."""

import csv
import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from phi3_jax.train import bench as bench_finetune
from phi3_jax.train import bench_torch
from phi3_jax.train.bench import TurnOptions, TurnResult
from phi3_jax.train.finetune import finetune
from phi3_jax.train.recipe import make_recipe
from phi3_jax.train.settings import Settings
from small_checkpoint import write_checkpoint
from typer.testing import CliRunner

from phi3_jax.cli.app import app

WORDS = ["red", "green", "blue", "bright", "dark", "old", "new", "small", "large", "and", "with", "without"]
SEQUENCE: dict[str, Any] = {"task": "sequence-classification"}
TOKENS: dict[str, Any] = {"task": "token-classification"}
CAUSAL: dict[str, Any] = {"task": "causal-lm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, initializer_range=0.05)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 22 rows, a table and a tagged one, whose classes are not equally frequent."""
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    columns = ["text", "colour", "several", "one", "two"]
    with (
        (folder / "rows.csv").open("w", newline="") as table,
        (folder / "rows.jsonl").open("w") as tagged,
    ):
        writer = csv.writer(table)
        writer.writerow(columns)
        for number in range(22):
            words = random.choice(WORDS, random.integers(2, 7)).tolist()
            colour = ("red", "green", "blue", "red")[number % 4]
            several = "|".join(each for each in ("old", "new", "small") if each in words)
            writer.writerow([" ".join(words), colour, several or "old", number / 10, -number / 20])
            tags = ["B-size" if word in ("small", "large") else "O" for word in words]
            tagged.write(json.dumps({"words": words, "labels": tags}) + "\n")
    return folder


def settings(model: Path, rows: Path, **changes: Any) -> Settings:
    """Returns settings with which every number of the optimizer shows within a few steps."""
    file = rows / ("rows.jsonl" if changes["task"] == "token-classification" else "rows.csv")
    given: dict[str, Any] = {"model": str(model), "train_file": str(file), "label_column": "colour"}
    given |= {"dtype": "float32", "train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.5}
    given |= {"max_grad_norm": 0.5, "max_steps": 6, "warmup_ratio": 0.2, "max_length": 24, "max_buckets": 1}
    return Settings(**given | {"dropout": False} | changes)


slow = pytest.mark.slow


class Run:
    """A few training steps; the settings that differ between tests identify them in stored answers."""

    def __init__(self, settings: Settings, changes: dict[str, Any]):
        self.options, self.answer_key = TurnOptions(settings, steps=3, cache_dir=None), changes


@stored
def their_losses(run: Run) -> list[float]:
    """Returns the losses of two turns with transformers."""
    turn = bench_finetune._theirs(run.options)
    return [loss for result in (turn(), turn()) for loss in result.losses]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            SEQUENCE
            | {"label_smoothing": 0.1, "class_weights": "balanced", "gradient_accumulation_steps": 2},
            id="sequence-weights-parts",
        ),
        pytest.param(TOKENS | {"trained": "lora", "lora_rank": 2, "lora_alpha": 3.0}, id="tokens-lora"),
        pytest.param(CAUSAL | {"packing": True, "max_length": 48, "train_batch_size": 2}, id="causal-packed"),
        pytest.param(SEQUENCE | {"trained": "head"}, id="sequence-head", marks=slow),
        pytest.param(SEQUENCE | {"trained": "lora", "remat": "full"}, id="sequence-lora-remat", marks=slow),
        pytest.param(TOKENS | {"class_weights": {"O": 1.0, "B-size": 3.0}}, id="tokens", marks=slow),
        pytest.param(CAUSAL | {"label_smoothing": 0.1}, id="causal", marks=slow),
        pytest.param(CAUSAL | {"trained": "lora", "max_grad_norm": None}, id="causal-lora", marks=slow),
        pytest.param(
            SEQUENCE
            | {"problem_type": "multi_label_classification", "label_column": "several"}
            | {"label_smoothing": 0.1, "class_weights": {"old": 1.0, "new": 2.0, "small": 3.0}},
            id="several-labels",
            marks=slow,
        ),
        pytest.param(
            SEQUENCE | {"problem_type": "regression", "label_column": ["one", "two"]},
            id="regression",
            marks=slow,
        ),
        pytest.param(SEQUENCE | {"dtype": "bfloat16"}, id="sequence-bfloat16", marks=slow),
        pytest.param(
            SEQUENCE | {"dtype": "bfloat16", "trained": "lora"}, id="sequence-bfloat16-lora", marks=slow
        ),
    ],
)
def test_both_sides_have_the_same_losses(model: Path, rows: Path, changes: dict[str, Any]) -> None:
    """The last step's batch has padding rows."""
    run = Run(settings(model, rows, **changes), changes)
    options, other = run.options, their_losses(run)
    turn = bench_finetune._ours(options)
    mine = [loss for result in (turn(), turn()) for loss in result.losses]
    assert len(mine) == 6
    assert max(mine[3:]) < max(mine[:3])
    dtype = options.settings.dtype
    tolerance = bench_finetune.AGREE[dtype] / (5 if dtype == "float32" else 1)
    np.testing.assert_allclose(mine, other, rtol=tolerance)


@pytest.mark.live
@pytest.mark.parametrize(("remat", "kept"), [("auto", True), ("none", True), ("full", False)])
def test_remat_applies_to_both_sides(model: Path, rows: Path, remat: str, kept: bool) -> None:
    recipe = make_recipe(settings(model, rows, **SEQUENCE, remat=remat), None, None)
    assert bench_torch._model(recipe).is_activation_checkpointing != kept


@pytest.mark.live
def test_a_whole_run_keeps_the_best(model: Path, rows: Path, tmp_path: Path) -> None:
    """The loss rises again at this learning rate; test and validation rows are the same."""
    files = {"validation_file": str(rows / "rows.csv"), "test_file": str(rows / "rows.csv")}
    file = tmp_path / "metrics.json"
    rate = {"learning_rate": 0.05, "lr_scheduler_type": "constant"}
    run = settings(model, rows, **SEQUENCE, **files, metric_for_best_model="loss", eval_steps=1, **rate)
    result = bench_finetune.run_whole(run, output=file, cache_dir=None)
    losses = {step: metrics["loss"] for step, metrics in result.validation.items()}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert result.best_step < 6
    assert result.metrics["validation"] == result.validation[result.best_step]
    assert result.metrics["test"] == pytest.approx(result.metrics["validation"], abs=1e-6)
    summary = json.loads(file.read_text())
    assert summary["metrics"] == result.metrics
    assert summary["settings"]["learning_rate"] == 0.05
    assert 0 < summary["seconds_per_step"] < summary["training_seconds"] < summary["total_seconds"]


@pytest.mark.live
def test_a_whole_run_stops_when_patience_is_over(model: Path, rows: Path) -> None:
    run = settings(model, rows, **SEQUENCE, eval_steps=1, learning_rate=1e-9, early_stopping_patience=2)
    result = bench_finetune.run_whole(run, output=None, cache_dir=None)
    assert result.best_step == 1
    assert sorted(result.validation) == [1, 2, 3]


@slow
@pytest.mark.parametrize(
    "task", [SEQUENCE, TOKENS | {"trained": "lora"}, CAUSAL], ids=lambda task: task["task"]
)
def test_a_whole_run_has_the_metrics_of_finetune(
    model: Path, rows: Path, tmp_path: Path, task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    test = str(rows / ("rows.jsonl" if task["task"] == "token-classification" else "rows.csv"))
    changes = task | {"validation_file": test, "test_file": test, "max_steps": None, "num_train_epochs": 2}
    run = settings(model, rows, **changes, learning_rate=1e-3, output_dir=tmp_path / "run")
    ours = finetune(run, show=False)
    theirs = bench_finetune.run_whole(run, output=None, cache_dir=None)
    assert len(theirs.validation) == 2
    assert theirs.metrics.keys() == ours.keys() == {"validation", "test"}
    for split, metrics in ours.items():
        assert theirs.metrics[split] == pytest.approx(metrics, rel=1e-4)
    printed = capsys.readouterr().out
    assert re.search(rf"test: loss {theirs.metrics['test']['loss']:.4f}", printed)
    assert re.search(r"[\d.]+ s a step \(median\); training 0:00:\d\d, evaluation 0:00:\d\d", printed)


@slow
def test_sides_take_turns(model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(model, rows, **SEQUENCE)
    bench_finetune.run_turns(run, steps=2, rounds=2, cache_dir=None)
    printed = capsys.readouterr().out
    assert re.search(r"phi3-jax\W+transformers\W+ratio", printed), printed
    assert re.search(r"seconds a step\W+\d+\.\d+\W+\d+\.\d+\W+\d+\.\d\d\b", printed), printed
    assert re.search(r"losses of the first 2 steps differ by (\d|[\d.]+)e-0[5-9] at most", printed), printed


def turns(*losses: list[float], seconds: float) -> list[TurnResult]:
    return [TurnResult(seconds * (1 + number), each) for number, each in enumerate(losses)]


@pytest.mark.parametrize(("other", "alike"), [(5.0004, True), (5.0006, False), (np.nan, False)])
def test_warns_of_losses_that_differ(
    other: float, alike: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = TurnOptions(Settings(dtype="float32"), steps=2, cache_dir=None)
    later = [6.0, 6.0], [6.0, 4.0]
    mine, theirs = turns([0.5, 5.0], *later, seconds=1), turns([0.5, other], [7.0, 7.0], later[1], seconds=3)
    results = {"mine": mine, "other": theirs}
    with caplog.at_level(logging.WARNING):
        bench_finetune._print_turns(results, options)
    printed = capsys.readouterr().out
    assert re.search(r"seconds a step\W+1\.000\W+3\.000\W+3\.00\b", printed), printed
    assert re.search(r"last loss\W+4\.0000\W+4\.0000", printed), printed
    assert ("do not train alike" in caplog.text) != alike


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"optim": "lion"}, "optim=lion is not compared"), ({"remat": "dots"}, "remat=dots has no counterpart")],
)
def test_rejects_settings_without_a_counterpart(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for run in (
        lambda: bench_finetune.run_turns(Settings(**changes), steps=1, rounds=1, cache_dir=tmp_path),
        lambda: bench_finetune.run_whole(Settings(**changes), output=None, cache_dir=tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_rejects_a_missing_directory_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no directory .*absent; make it"):
        bench_finetune.run_whole(Settings(), output=tmp_path / "absent" / "m.json", cache_dir=tmp_path)


def command(*arguments: str) -> Exception | None:
    return CliRunner().invoke(app, ["bench-finetune", *arguments]).exception


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretends that of the other side's packages only these are installed."""
    find = importlib.util.find_spec
    other_side = ("torch", "transformers", "peft")

    def find_spec(name: str) -> Any:
        return (True if name in names else None) if name in other_side else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_the_command_passes_settings_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "torch", "transformers", "peft")
    called: list[Any] = []
    monkeypatch.setattr(
        "phi3_jax.cli.bench_finetune.run_turns", lambda *args, **named: called.append((args, named))
    )
    monkeypatch.setattr(
        "phi3_jax.cli.bench_finetune.run_whole", lambda *args, **named: called.append((args, named))
    )
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.5\nmax_length: 99\n")
    assert command(str(file), "--max-length", "77", "--steps", "5", "--no-dropout") is None
    assert command("--whole-run", "--output", "m.json", "--lora-targets", "[o_proj]") is None
    ((first,), turns), ((second,), whole) = called
    assert first == Settings(learning_rate=0.5, max_length=77, dropout=False)
    assert (turns["steps"], turns["rounds"]) == (5, 3)
    assert second == Settings(lora_targets=["o_proj"])
    assert whole["output"] == Path("m.json")


def test_the_command_needs_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch", "transformers")
    with pytest.raises(ValueError, match="needs peft; pip install peft"):
        raise command("--trained", "lora") or AssertionError
    with pytest.raises(ValueError, match="--output is for the metrics of --whole-run"):
        raise command("--output", "metrics.json") or AssertionError
