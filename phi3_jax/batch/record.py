"""The state of an output of answers, and how the parts of several processes are combined."""

import glob
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi3_jax.batch.summary import BatchSummary
from phi3_jax.errors import UserError
from phi3_jax.runs.files import replacing, write_text
from phi3_jax.runs.text import read_json
from phi3_jax.storage.resume import RunFile

POLL_SECONDS = 0.5
"""Time between two looks at the state of other processes."""


def part_path(output: Path, index: int, processes: int) -> Path:
    """Returns the path of the answers of one process, until all are combined."""
    return output.with_name(f"{output.name}.part-{index}-of-{processes}")


class Record:
    """OUTPUT.run.json: the options that the output depends on, and the summary once it is finished.

    Args:
        output: the file of answers.
        options: everything that the answers depend on, for JSON.
        processes: how many write the output.
    """

    def __init__(self, output: Path, options: dict[str, Any], processes: int):
        self.output, self._processes = output, processes
        self._file = RunFile(output.with_name(f"{output.name}.run.json"), output, options)

    def open(self, overwrite: bool) -> dict[str, Any] | None:
        """Starts or resumes the output; returns the summary if it is finished.

        Until `release`, no other run can open it.

        Raises:
            UserError: the output is something else, was started with other options, or another run has it.
        """
        if not self.output.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.output.parent} to write {self.output.name} to")
        self._file.lock()
        parts = list(self.output.parent.glob(f"{glob.escape(self.output.name)}.part-*"))
        if overwrite:
            self._file.remove()
            for old in (self.output, *parts):
                old.unlink(missing_ok=True)
            parts = []
        if not self._file.exists() or not (self.output.exists() or parts):
            if self.output.exists() and self.output.stat().st_size:
                raise UserError(
                    f"{self.output} already exists, and there is no {self._file.name} with its options; "
                    "choose another output, or give --overwrite to start over"
                )
            self._file.write(processes=self._processes)
            return None
        finished = self._file.read(self._finished)
        if finished is not None:
            for old in parts:  # of a process that was killed when everything was done
                old.unlink()
        return finished

    def release(self) -> None:
        """Lets other runs open the output."""
        self._file.release()

    def finish(self, summary: BatchSummary) -> None:
        """Writes the summary of the finished output."""
        self._file.write(processes=self._processes, finished=asdict(summary))

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary once process 0 has finished the output."""
        finished: dict[str, Any] | None = read_json(Path(self._file.path)).get("finished")
        return finished

    def _finished(self, values: dict[str, Any]) -> dict[str, Any] | None:
        finished: dict[str, Any] | None = values.get("finished")
        if finished is None and values["processes"] != self._processes:
            raise self._file.mismatch(f"processes: {values['processes']} -> {self._processes}")
        return finished


def combine_parts(
    record: Record, part: Path, summary: BatchSummary, processes: int, index: int
) -> BatchSummary:
    """Combines the parts of all processes once they are done, and returns the summary of all.

    The processes wait for each other by files: a collective operation would time out where one has much
    more to do than another.
    """
    if processes == 1:
        record.finish(summary)
        return summary
    output = record.output
    write_text(_done(part), json.dumps(asdict(summary)))
    if index > 0:
        while (finished := record.finished) is None:
            time.sleep(POLL_SECONDS)
        return BatchSummary(**finished)
    parts = [part_path(output, other, processes) for other in range(processes)]
    while not all(_done(each).exists() for each in parts):
        time.sleep(POLL_SECONDS)
    with replacing(output) as work, work.open("wb") as file:
        for each in parts:
            with each.open("rb") as lines:
                shutil.copyfileobj(lines, file, 1 << 20)
    whole = BatchSummary.combine(
        [BatchSummary(**json.loads(_done(each).read_text(encoding="utf-8"))) for each in parts]
    )
    record.finish(whole)
    for each in parts:
        for path in (each, _done(each)):
            path.unlink(missing_ok=True)
    return whole


def _done(part: Path) -> Path:
    return part.with_name(f"{part.name}.done")
