"""Runs of finetune in stores: the same results as on a disk, resumed from any machine."""

import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phi3_jax.train import finetune as module
from phi3_jax.train.checkpoints import saved_steps
from phi3_jax.train.dry_run import dry_run
from phi3_jax.train.finetune import InterruptedRunError, finetune
from runs import interrupted_after, settings_of, write_base, write_rows
from stores import Store

from phi3_jax.classification import Classifier
from phi3_jax.errors import UserError
from phi3_jax.storage.claims import TakenOverError
from phi3_jax.storage.targets import files_below, names_in
from phi3_jax.storage.urls import StorageError

# If Orbax cannot read or write, its threads end with the error too and leave coroutines.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIONS: dict[str, Any] = {"max_steps": 4, "eval_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _collect_coroutines() -> Iterator[None]:
    """Ends Orbax's coroutines here, where their warnings are expected, not in a test of another module."""
    yield
    gc.collect()


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


def test_keeps_no_checkpoints_on_request_and_starts_over(
    memory: Store, folder: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{memory.url}/run"
    run(folder, base, url, max_steps=1, keep_checkpoints=False)
    assert "checkpoints" not in names_in(url)
    memory.put("run/checkpoints/9/half", b"")
    with pytest.raises(UserError, match=r"resumed: seed: 0 -> 1\. Choose another --output-dir"):
        run(folder, base, url, max_steps=1, seed=1)
    run(folder, base, url, max_steps=1, seed=1, overwrite_output_dir=True)
    assert names_in(f"{url}/checkpoints") == ["1"]
    memory.put("mine/model.safetensors", b"")
    with pytest.raises(UserError, match=r"mine holds model\.safetensors, which no run of finetune wrote"):
        run(folder, base, f"{memory.url}/mine")


def test_a_run_that_was_taken_over_ends(
    memory: Store, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, url = module.FinetuneRun._take_step, f"{memory.url}/run"

    def take_over(self: Any) -> None:
        take_step(self)
        memory.put("run/.run.json.lock", b'{"id": "other", "process": 7, "machine": "m"}')

    monkeypatch.setattr(module.FinetuneRun, "_take_step", take_over)
    with pytest.raises(TakenOverError, match="run was taken over by process 7 on m"):
        run(folder, base, url)
    assert saved_steps(f"{url}/checkpoints") == []


def test_a_dry_run_says_that_a_store_cannot_be_written(server: Store, folder: Path, base: Path) -> None:
    assert server.proxy is not None
    settings = settings_of(folder, base, output_dir=f"{server.url}/run")
    options: Any = {"mesh": None, "topology": None, "distributed": False, "cache_dir": None}
    assert list(dry_run(settings, **options).lines())[-1].startswith(f"{server.url}/run: model, report")
    server.proxy.fault = lambda number, path: "403"
    with pytest.raises(StorageError, match="the store refuses access"):
        dry_run(settings, **options)
    with pytest.raises(StorageError, match="the store refuses access"):
        run(folder, base, f"{server.url}/run")


def test_resumes_from_the_checkpoint_before_a_damaged_one(
    store: Store, folder: Path, base: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A store that gives no answer is an error, after which the checkpoints are as before."""
    url = f"{store.url}/run"
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        with pytest.raises(InterruptedRunError):
            run(folder, base, url)
    if store.proxy is not None:
        store.proxy.fault = lambda number, path: "403" if "checkpoints" in path else None
        with pytest.raises(StorageError, match="the store refuses access"):
            run(folder, base, url)
        store.proxy.fault = lambda number, path: None
    names = files_below(f"{url}/checkpoints/3")
    name = max(
        (each for each in names if "/d/" in each),
        key=lambda each: len(store.get(f"run/checkpoints/3/{each}")),
    )
    store.put(f"run/checkpoints/3/{name}", b"damaged")
    with caplog.at_level(logging.WARNING):
        run(folder, base, url)
    assert "3 cannot be read" in caplog.text
    assert "resuming after step 2 of 4" in caplog.text
    assert_is_whole(store, whole)


def test_a_store_that_fails_delays_checkpoints_and_not_the_run(
    server: Store, folder: Path, base: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Of 60 requests one fails and one answer is cut; checkpoints are refused for a while."""
    assert server.proxy is not None
    refused = []

    def fault(number: int, path: str) -> str | None:
        if "checkpoints" in path and "_METADATA" in path and len(refused) < 3:
            refused.append(path)
            return "403"
        return {0: "503", 9: "cut"}.get(number % 60)

    server.proxy.fault = fault
    with caplog.at_level(logging.WARNING):
        run(folder, base, f"{server.url}/run")
    assert refused
    assert "is not written: " in caplog.text
    assert "the store refuses access" in caplog.text
    server.proxy.fault = lambda number, path: None
    assert_is_whole(server, whole)
