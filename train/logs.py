"""The log of a run: a line of JSON for each record, and the same numbers for TensorBoard and others."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from phi3_jax.errors import UserError
from phi3_jax.runs.files import replacing
from phi3_jax.runs.json_values import json_value

from .trackers import TrackerName, open_trackers, scalars_of

LOG = "log.jsonl"


class RunLog:
    """Writes `log.jsonl` in a run's directory, and reports the same numbers; only one process does.

    Every record is handed to the system when `record` returns, so that a killed run loses none. A log that is
    resumed at a step continues after it: records of later steps and of the test data, and an incomplete last
    line are dropped. From step 0 an older log is replaced.

    Args:
        directory: of the run.
        resume_at: the step; 0 starts over.
        trackers: the libraries that it reports to.
        settings: of the run, for the libraries that show them.

    Raises:
        UserError: a line before the last is broken, and the message names the file and the line; or a library
            cannot start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_at: int,
        trackers: Sequence[TrackerName] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / LOG
        kept = []
        if resume_at and path.exists():
            # The end of the run scores the test data again.
            kept = [
                (line, record)
                for line, record in _lines(path)
                if record["step"] <= resume_at and record.get("kind") != "test"
            ]
        with replacing(path) as work:
            work.write_bytes(b"".join(line + b"\n" for line, _ in kept))
        self._trackers = open_trackers(
            trackers,
            directory,
            resume_at=resume_at,
            settings=settings or {},
            records=[record for _, record in kept],
        )
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def text(self) -> str:
        """Returns all lines."""
        return self._path.read_text(encoding="utf-8")

    def record(
        self, kind: Literal["train", "validation", "test"], step: int, values: Mapping[str, float]
    ) -> None:
        """Adds a line {"kind", "step", **values}, and reports each value as kind/name."""
        numbers = {name: json_value(float(value)) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **numbers}, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.add(step, scalars_of(kind, values))

    def close(self, *, failed: bool = False) -> None:
        """Closes the file and ends the reports.

        Args:
            failed: an error or a signal ended the run.
        """
        self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


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
