"""The log of a run: a line of JSON for each record, and the same scalars for TensorBoard."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from phi3_jax.errors import UserError
from phi3_jax.runs.files import replacing
from phi3_jax.runs.json_values import json_value

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """Writes `log.jsonl` and `tensorboard/` in a run's directory; only one process does.

    Every record is handed to the system when `record` returns, so that a killed run loses none. A log that is
    resumed at a step continues after it: records of later steps and of the test data, and an incomplete last
    line are dropped. From step 0 an older log is replaced.

    Raises:
        UserError: a line before the last is broken; the message names the file and the line.
    """

    def __init__(self, directory: Path, *, resume_at: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / LOG
        kept = []
        if resume_at and path.exists():
            # The end of the run scores the test data again.
            kept = [
                line
                for line, record in _lines(path)
                if record["step"] <= resume_at and record.get("kind") != "test"
            ]
        with replacing(path) as work:
            work.write_bytes(b"".join(line + b"\n" for line in kept))
        self._events = _EventFile(directory / TENSORBOARD, resume_at)
        self._file = path.open("a", encoding="utf-8")

    def record(
        self, kind: Literal["train", "validation", "test"], step: int, values: Mapping[str, float]
    ) -> None:
        """Adds a line {"kind", "step", **values}, and a scalar kind/name to TensorBoard for each value."""
        numbers = {name: json_value(float(value)) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **numbers}, allow_nan=False) + "\n")
        self._file.flush()
        self._events.add(step, {f"{kind}/{name}": float(value) for name, value in values.items()})

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `log.jsonl`, without an incomplete last line; their values are floats.

    Raises:
        UserError: a line before the last is broken; the message names the file and the line.
    """
    return [
        {name: value if name in ("kind", "step") else float(value) for name, value in record.items()}
        for _, record in _lines(path)
    ]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError("it is not an object with a step")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(
                f"{path}, line {number} is not a record of a run: {error}; repair or remove the line"
            ) from error
        yield line, record


class _EventFile:
    """The scalars as TensorBoard reads them.

    The library's `SummaryWriter` holds events back for two minutes, which a killed run loses although its
    checkpoint is younger, and gives two files of one second the same name; this class writes at once.
    """

    def __init__(self, directory: Path, resume_at: int) -> None:
        directory.mkdir(exist_ok=True)
        if not resume_at:
            for path in directory.glob("events.out.tfevents.*"):
                path.unlink()
        # TensorBoard reads files in the order of their names.
        self._writer = RecordWriter(str(directory / f"events.out.tfevents.{time.time_ns()}"))
        self._write(Event(file_version="brain.Event:2"))
        if resume_at:
            # Hides the scalars that older files have for later steps.
            self._write(Event(step=resume_at + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
