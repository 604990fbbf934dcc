"""The libraries that a run reports to: they get the numbers of `log.jsonl`, also after a kill."""

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from phi3_jax.train import trackers as module
from phi3_jax.train.dry_run import dry_run
from phi3_jax.train.finetune import InterruptedRunError, finetune
from phi3_jax.train.logs import RunLog, read_log
from phi3_jax.train.settings import Settings
from phi3_jax.train.trackers import find_trackers
from runs import files, interrupted_after, run, settings_of

from phi3_jax.cli.settings import read_settings
from phi3_jax.errors import UserError


def logged(folder) -> list[tuple[str, int, float]]:
    """Returns the numbers of the log by the names that libraries get."""
    return [
        (f"{record['kind']}/{name}", record["step"], value)
        for record in read_log(folder / "run" / "log.jsonl")
        for name, value in record.items()
        if name not in ("kind", "step")
    ]


@pytest.fixture
def installed(monkeypatch):
    """Returns a function that makes these libraries, and no others, seem to be installed."""

    def install(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None
        )

    return install


@pytest.fixture
def wandb(monkeypatch) -> list[SimpleNamespace]:
    """Replaces wandb; returns its runs, with their options and numbers."""
    fake: Any = ModuleType("wandb", None)
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.Error = RuntimeError
    runs: list[SimpleNamespace] = []

    def init(**options):
        this = SimpleNamespace(id=options["id"] or f"new-{len(runs)}", options=options, rows=[], code=None)
        this.define_metric = lambda name, step_metric: None
        this.log = this.rows.append
        this.finish = lambda exit_code: setattr(this, "code", exit_code)
        runs.append(this)
        return this

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def numbers(run: SimpleNamespace) -> list[tuple[str, int, float]]:
    return [(name, row["step"], x) for row in run.rows for name, x in row.items() if name != "step"]


def test_settings_take_one_several_all_or_none():
    assert Settings().report_to == ["tensorboard"]
    assert read_settings(None, {"report_to": "wandb"}).report_to == ["wandb"]
    assert read_settings(None, {"report_to": "tensorboard,mlflow"}).report_to == ["tensorboard", "mlflow"]
    assert Settings.model_validate({"report_to": "none"}).report_to == ["none"]
    with pytest.raises(UserError, match="give all or none alone"):
        Settings.read(None, {"report_to": ["all", "wandb"]})
    with pytest.raises(UserError, match="report_to"):
        Settings.read(None, {"report_to": ["neptune"]})


def test_all_are_those_that_are_installed(installed):
    installed("tensorboardX", "mlflow")
    assert find_trackers(["all"]) == ("tensorboard", "mlflow")
    assert find_trackers(["none"]) == ()
    assert find_trackers(["mlflow"]) == ("mlflow",)


def test_an_absent_library_is_an_error_before_the_model_is_loaded(folder, base, installed):
    installed("tensorboardX")
    settings = settings_of(folder, base, report_to=["tensorboard", "wandb"])
    message = r"report_to=wandb needs the library wandb, .* pip install 'phi3-jax\[wandb\]'"
    with pytest.raises(UserError, match=message):
        dry_run(settings, mesh=None, topology=None, distributed=False, cache_dir=None)
    with pytest.raises(UserError, match=message):
        finetune(settings, show=False)
    assert not (folder / "run").exists()


def test_none_writes_the_log_alone(folder, base):
    run(folder, base, report_to=["none"], max_steps=1)
    assert "log.jsonl" in files(folder)
    assert not {"tensorboard", "trackers.json"} & files(folder)


def test_a_resumed_run_continues_its_report(folder, base, wandb, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            run(folder, base, report_to=["wandb"])
    run(folder, base, report_to=["wandb"])
    first, second = wandb
    assert second.options["id"] == first.id == "new-0"
    assert (first.code, second.code) == (1, 0)
    assert first.options["name"] == "run"
    assert first.options["config"]["learning_rate"] == 3e-3
    assert numbers(first) + numbers(second) == logged(folder)
    assert {"train/loss", "train/learning_rate", "validation/accuracy"} <= {
        name for name, *_ in numbers(second)
    }


def test_a_new_run_in_the_directory_has_a_new_report(tmp_path, wandb):
    for _ in range(2):
        RunLog(tmp_path, resume_at=0, trackers=["wandb"]).close()
    assert [each.id for each in wandb] == ["new-0", "new-1"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "new-1"}


def test_an_error_of_a_library_is_one_line_and_closes_the_others(tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured")

    closed = []
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    close = module.EventFile.close
    monkeypatch.setattr(
        module.EventFile, "close", lambda self, failed: (closed.append(failed), close(self, failed=failed))
    )
    with pytest.raises(UserError, match="report_to=wandb: api_key not configured"):
        RunLog(tmp_path, resume_at=0, trackers=["tensorboard", "wandb"])
    assert closed == [True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
def test_wandb_gets_the_numbers_of_the_log(folder, base, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(folder, base, report_to=["wandb"], max_steps=3)
    (path,) = (folder / "run" / "wandb").glob("offline-run-*/*.wandb")
    found = []
    for data in offline_records(path):
        items = Record.FromString(data).history.item
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        own = {name: value for name, value in row.items() if name.startswith(("train/", "validation/"))}
        found += [(name, row["step"], value) for name, value in own.items()]
    assert sorted(found) == sorted(logged(folder))


def offline_records(path: Path) -> Iterator[bytes]:
    """Yields the records of wandb's file, which is a log of LevelDB after a header of its own."""
    data, position, parts = path.read_bytes(), 7, b""
    while position < len(data):
        if (left := -position % 32768) < 7:  # no record begins at the end of a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        parts += data[position - length : position]
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
def test_mlflow_gets_the_numbers_of_the_log(folder, base, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "lamps")
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            run(folder, base, report_to=["mlflow"])
    run(folder, base, report_to=["mlflow"])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("lamps")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train_batch_size"] == "8"
    history = [
        (name, point.step, point.value)
        for name in found.data.metrics
        for point in client.get_metric_history(found.info.run_id, name)
    ]
    assert sorted(history) == sorted(logged(folder))
