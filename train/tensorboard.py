"""Files of scalars for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

TENSORBOARD = "tensorboard"
"""The folder within a run's directory."""


class EventFile:
    """The scalars of a run in its folder `tensorboard`, as TensorBoard reads them.

    The library's `SummaryWriter` holds events back for two minutes, which a killed run loses although its
    checkpoint is younger, and gives two files of one second the same name; this class writes at once.
    """

    def __init__(self, directory: Path, resume_at: int) -> None:
        directory = directory / TENSORBOARD
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

    def close(self, *, failed: bool) -> None:
        self._writer.close()
