"""Checkpoints: the same state is restored, or the one before it."""

import gc
import logging
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from marks import slow
from phi3_jax.train import checkpoint_errors
from phi3_jax.train.checkpoints import Checkpoints
from reference import on_mesh, small_config

from phi3_jax.checkpoint import CheckpointError
from phi3_jax.model import Phi3ForSequenceClassification
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.trainer import Trainer
from phi3_jax.trainer.optimizers import make_optimizer

# If Orbax cannot read or write, its threads end with the error too and leave coroutines.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BATCH = {"input_ids": np.arange(32).reshape(4, 8) + 4, "labels": np.array([0, 1, 2, 0])}


def trained(model, optim="adamw", steps=2):
    trainer = Trainer(model, make_optimizer(optim, 1e-3))
    state = trainer.start(model)
    for _ in range(steps):
        state, _ = trainer.step(state, BATCH)
    return trainer, state


@pytest.fixture(scope="module")
def run():
    model = Phi3ForSequenceClassification(small_config(num_labels=3, num_hidden_layers=1))
    trainer, state = trained(model)
    return trainer, state, trainer.start(model)


@pytest.fixture(scope="module", autouse=True)
def _collect_coroutines():
    """Ends Orbax's coroutines here, where their warnings are expected, not in a test of another module."""
    yield
    gc.collect()


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", greater_is_better=True)
    yield opened
    opened.close()


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


@pytest.mark.parametrize("optim", ["adamw", *(slow(each) for each in ("lion", "adafactor"))])
def test_restores_the_same_state(checkpoints, optim):
    model = Phi3ForSequenceClassification(small_config(num_labels=3, num_hidden_layers=1))
    trainer, state = trained(model, optim)
    checkpoints.save(2, state, {"note": [1, "x"]}, 0.5)
    checkpoints.wait()
    restored = checkpoints.restore_last(trainer.start(model))
    assert restored.step == 2
    assert restored.about["note"] == [1, "x"]
    assert same(restored.state, state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    _, ours = trainer.step(restored.state, BATCH)
    _, expected = trainer.step(state, BATCH)
    assert float(ours.loss) == float(expected.loss)


@pytest.mark.slow
def test_restores_the_shardings(tmp_path):
    model = Phi3ForSequenceClassification(
        small_config(num_labels=4, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)
    )
    _, state = trained(on_mesh(model, make_mesh("fsdp=4,tensor=2")), steps=0)
    checkpoints = Checkpoints(tmp_path / "c", greater_is_better=True)
    checkpoints.save(1, state, {}, 0.0)
    checkpoints.wait()
    restored = checkpoints.restore_last(state)
    assert same(restored.state, state)
    for ours, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        assert ours.sharding.is_equivalent_to(expected.sharding, ours.ndim)
    checkpoints.close()


@pytest.mark.parametrize(
    ("greater", "scores", "kept"),
    [
        (True, [0.5, 0.9, 0.1, 0.6, 0.7], [2, 4, 5]),
        (False, [0.5, 0.9, 0.1, 0.6, 0.7], [3, 4, 5]),
        (True, [0.5, 0.9, 0.9, 0.6, 0.9], [2, 4, 5]),  # the first of equals
        (False, [0.5, 0.1, 0.1, 0.6, 0.1], [2, 4, 5]),
    ],
)
def test_keeps_the_best_and_the_last_two(tmp_path, run, greater, scores, kept):
    _, state, _ = run
    for steps in ([1, 2, 3], [4, 5]):  # by two processes
        checkpoints = Checkpoints(tmp_path / "c", greater_is_better=greater)
        for step in steps:
            checkpoints.save(step, state, {}, scores[step - 1])
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "c", greater_is_better=greater)
    assert checkpoints.steps() == kept
    checkpoints.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for position in range(len(content) // 4, 3 * len(content) // 4, 64):  # some bytes are of no array
        content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_restores_the_checkpoint_before_a_damaged_one(checkpoints, run, damage, caplog):
    _, state, initial = run
    for step in (1, 2):
        checkpoints.save(step, state, {"note": step}, 0.5)
    checkpoints.wait()
    damage(largest(checkpoints.directory / "2"))
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.restore_last(initial)
    assert "2 cannot be read" in caplog.text
    assert "resuming from the checkpoint before it" in caplog.text
    assert restored.step == 1
    assert restored.about["note"] == 1
    assert same(restored.state, state)
    assert checkpoints.steps() == [1]  # step 2 can be saved again
    caplog.clear()  # the error keeps coroutines alive


def test_fails_without_an_intact_checkpoint(checkpoints, run):
    _, state, initial = run
    checkpoints.save(1, state, {}, 0.5)
    checkpoints.wait()
    flip(largest(checkpoints.directory / "1"))
    with pytest.raises(CheckpointError, match="cannot be read: "):
        checkpoints.restore_last(initial)


def test_removes_leftovers_of_a_killed_process(tmp_path, run):
    _, state, _ = run
    left = tmp_path / "c" / "3.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    checkpoints = Checkpoints(tmp_path / "c", greater_is_better=True)
    assert checkpoints.steps() == []
    checkpoints.save(4, state, {}, 0.0)
    checkpoints.close()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["4"]


def test_writes_after_a_failed_one_are_silent(monkeypatch):
    """Only those: other errors that nothing can raise are printed as before."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    checkpoint_errors.silence_writes_after_a_failed_one.__wrapped__()
    for error in (
        RuntimeError("Event loop is closed"),
        RuntimeError("else"),
        OSError("Event loop is closed"),
    ):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(each.exc_value) for each in printed] == ["else", "Event loop is closed"]
    assert printed[1].exc_type is OSError


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, run):
    """Files cannot grow beyond 4 KiB, as on a full disk."""
    _, state, initial = run
    checkpoints = Checkpoints(tmp_path / "c", greater_is_better=True)

    def write(step):  # either call can find the disk full
        checkpoints.save(step, state, {}, 0.5)
        checkpoints.wait()

    write(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot be written: .*; the checkpoint before it is intact"
        ):
            write(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Checkpoints(tmp_path / "c", greater_is_better=True)
    restored = again.restore_last(initial)
    assert restored.step == 1
    assert same(restored.state, state)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]
    again.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ValueError("OUT_OF_RANGE: Error writing /a/b: File too large [os_error_code='27']"),
            "File too large",
        ),
        (OSError(30, "Read-only file system", "/a/b"), "Read-only file system"),
        (ValueError("x: No space left on device [os_error_code='28']"), "there is no space left on the disk"),
        (ValueError("something else\nand more"), "something else"),
    ],
)
def test_names_the_systems_reason(checkpoints, run, monkeypatch, error, reason):
    def save(*_, **__):
        raise error

    monkeypatch.setattr(type(checkpoints._manager), "save", save)
    with pytest.raises(CheckpointError, match=rf"2 cannot be written: {reason}; the checkpoint before it"):
        checkpoints.save(2, run[1], {}, 0.5)
