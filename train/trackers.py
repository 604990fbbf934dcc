"""Libraries that a run reports its numbers to, beside `log.jsonl`, named as in transformers."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from phi3_jax.errors import UserError
from phi3_jax.runs.files import write_text

from .tensorboard import TENSORBOARD, EventFile

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "phi3-jax"
"""The name of the project or experiment, unless the library's own variable gives another."""

RUNS = "trackers.json"
"""The file of a run's directory with the numbers by which the libraries know the run."""


class Tracker(Protocol):
    """What a run reports its numbers to."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds numbers by name, as in "train/loss"."""

    def close(self, *, failed: bool) -> None:
        """Ends the report."""


def find_trackers(report_to: Sequence[str]) -> tuple[TrackerName, ...]:
    """Returns the libraries of the setting `report_to`: "all" are those that are installed, "none" is none.

    Raises:
        UserError: one is not installed.
    """
    installed = [name for name in TRACKERS if importlib.util.find_spec(LIBRARIES[name]) is not None]
    if "all" in report_to:
        return tuple(installed)
    wanted = tuple(name for name in TRACKERS if name in report_to)
    for name in wanted:
        if name not in installed:
            extra = "train" if name == "tensorboard" else name
            raise UserError(
                f"report_to={name} needs the library {LIBRARIES[name]}, which is not installed: "
                f"pip install 'phi3-jax[{extra}]', or leave {name} out of report_to"
            )
    return wanted


def scalars_of(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Returns the numbers of a record by the names that they are reported with."""
    return {f"{kind}/{name}": float(value) for name, value in values.items()}


def open_trackers(
    names: Sequence[TrackerName],
    directory: Path,
    *,
    resume_at: int,
    settings: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]] = (),
) -> list[Tracker]:
    """Opens the reports of a run; one that is resumed after a step continues them.

    Args:
        directory: of the run, whose name they get.
        resume_at: the step; 0 starts new reports.
        settings: of the run, for libraries that show them.
        records: of the log up to this step, for TensorBoard if its folder is not there.

    Raises:
        UserError: a library cannot start, for example without a key or a connection.
    """
    path = directory / RUNS
    known: dict[str, str] = json.loads(path.read_text()) if resume_at and path.exists() else {}
    opened: list[Tracker] = []
    runs: dict[str, str] = {}
    try:
        for name in names:
            if name == "tensorboard":
                opened.append(_event_file(directory, resume_at, records))
                continue
            kind = _Wandb if name == "wandb" else _Mlflow
            tracker = kind(directory, known.get(name), settings)
            opened.append(tracker)
            runs[name] = tracker.run_id
    except BaseException:
        for each in opened:
            each.close(failed=True)
        raise
    if runs:
        write_text(path, json.dumps(known | runs) + "\n")
    return opened


def _event_file(directory: Path, resume_at: int, records: Sequence[Mapping[str, Any]]) -> EventFile:
    known = (directory / TENSORBOARD).exists()
    events = EventFile(directory, resume_at)
    if not known:
        for record in records:
            values = {name: value for name, value in record.items() if name not in ("kind", "step")}
            events.add(record["step"], scalars_of(record["kind"], values))
    return events


class _Wandb:
    """A run of Weights & Biases, whose own variables (WANDB_MODE, WANDB_PROJECT, ...) hold."""

    def __init__(self, directory: Path, run_id: str | None, settings: Mapping[str, Any]):
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=directory.absolute().name,
                id=run_id,
                resume="allow",
                dir=directory,
                config=dict(settings),
            )
        except wandb.Error as error:
            raise UserError(f"report_to=wandb: {error}") from error
        self.run_id: str = self._run.id
        # Its own count of steps cannot go back, as the evaluation of the best parameters at the end does.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of MLflow, whose own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...) hold."""

    def __init__(self, directory: Path, run_id: str | None, settings: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self._client = MlflowClient()
            if run_id is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
                found = self._client.get_experiment_by_name(name)
                experiment = self._client.create_experiment(name) if found is None else found.experiment_id
                run_id = self._client.create_run(experiment, run_name=directory.absolute().name).info.run_id
                params = [Param(key, str(value)) for key, value in settings.items()]
                self._client.log_batch(run_id, params=params)
            else:
                self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise UserError(f"report_to=mlflow: {error}") from error
        self.run_id: str = run_id

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self.run_id, name, value, step=step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")
