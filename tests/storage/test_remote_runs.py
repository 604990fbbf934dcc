"""Runs of finetune in stores: the same results as on a disk, resumed from any machine."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from phi3_jax.train.checkpoints import saved_steps
from phi3_jax.train.finetune import InterruptedRunError, finetune
from runs import interrupted_after, settings_of, write_base, write_rows
from stores import Store

from phi3_jax.classification import Classifier
from phi3_jax.storage.targets import names_in

OPTIONS: dict[str, Any] = {"max_steps": 4, "eval_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl")
    return tmp_path


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a local run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "train.jsonl")
    run(folder, base, folder / "run")
    return folder / "run"


def run(folder: Path, base: Path, output: object, **changes: Any) -> Any:
    return finetune(settings_of(folder, base, output_dir=output, **OPTIONS | changes), show=False)


def losses(log: bytes) -> list[tuple[str, int, float]]:
    """Returns what a log has but times."""
    records = [json.loads(line) for line in log.splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


def assert_is_whole(store: Store, whole: Path) -> None:
    """Asserts that a store has the same run as a local directory."""
    url = f"{store.url}/run"
    assert names_in(url) == sorted(path.name for path in whole.iterdir())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert store.get(f"run/{name}") == (whole / name).read_bytes()
    assert losses(store.get("run/log.jsonl")) == losses((whole / "log.jsonl").read_bytes())
    best = json.loads(store.get("run/metrics.json"))["best_step"]
    assert {best, OPTIONS["max_steps"]} <= set(saved_steps(f"{url}/checkpoints"))
    assert "finished" in json.loads(store.get("run/run.json"))


def test_a_run_is_resumed_on_another_machine(
    store: Store, folder: Path, base: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    url = f"{store.url}/run"
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        with pytest.raises(InterruptedRunError, match="interrupted after step 3, which is saved"):
            run(folder, base, url)
    store.put("run/log.jsonl", b"")  # as if killed before the log was copied
    monkeypatch.setenv("PHI3_JAX_CACHE", str(folder / "other machine"))
    with caplog.at_level(logging.WARNING):
        results = run(folder, base, url)
    assert "resuming after step 3 of 4" in caplog.text
    assert_is_whole(store, whole)
    assert len(names_in(f"{url}/tensorboard")) == 1
    assert not list((folder / "other machine" / "outputs").iterdir())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert run(folder, base, url) == results
    assert "is finished; nothing is left to do" in caplog.text
    Classifier.from_pretrained(url)
