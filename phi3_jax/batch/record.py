"""What an output of answers follows from, and how the parts of several processes become one."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi3_jax.batch.summary import Summary
from phi3_jax.errors import UserError
from phi3_jax.runs.files import differences, replacing

POLL_SECONDS = 0.5
"""Between two looks at what other processes have done."""


def part_of(output: Path, index: int, processes: int) -> Path:
    """Where a process has its answers until all are put together."""
    return output.with_name(f"{output.name}.part-{index}-of-{processes}")


class Record:
    """OUTPUT.run.json: what the output follows from, and the summary once it is finished.

    Args:
        output: the file of answers.
    """

    def __init__(self, output: Path):
        self.output = output
        self._path = output.with_name(f"{output.name}.run.json")

    def open(self, asked: dict[str, Any], processes: int, overwrite: bool) -> dict[str, Any] | None:
        """Begins, or finds what was begun; the summary if that is finished."""
        parts = list(self.output.parent.glob(f"{self.output.name}.part-*"))
        if overwrite:
            for path in (self._path, self.output, *parts):
                path.unlink(missing_ok=True)
            parts = []
        if not self._path.exists() or not (self.output.exists() or parts):
            if self.output.exists() and self.output.stat().st_size:
                raise UserError(
                    f"{self.output} is there already, and no {self._path.name} says what it is; choose "
                    "another output, or give --overwrite"
                )
            if not self.output.parent.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {self.output.parent} to write {self.output.name} to"
                )
            self._write({"asked": asked, "processes": processes})
            return None
        before = self._read()
        if changed := differences(before["asked"], asked):
            raise UserError(
                f"{self.output} was begun with something else, and cannot be gone on with: "
                f"{'; '.join(changed)}. Choose another output, or give --overwrite to begin anew"
            )
        if "finished" not in before and before["processes"] != processes:
            raise UserError(
                f"{self.output} was begun by {before['processes']} processes and can be gone on with by as "
                f"many, not by {processes}; give --overwrite to begin anew"
            )
        if "finished" in before:
            for path in parts:  # of a process that was killed when all was done
                path.unlink()
        return before.get("finished")

    def finish(self, summary: Summary) -> None:
        self._write(self._read() | {"finished": asdict(summary)})

    @property
    def finished(self) -> dict[str, Any] | None:
        return self._read().get("finished")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            found["asked"], found["processes"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} is broken ({error!r}); give --overwrite to begin anew") from error
        return found

    def _write(self, values: dict[str, Any]) -> None:
        with replacing(self._path) as work:
            work.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def put_together(record: Record, part: Path, summary: Summary, processes: int, index: int) -> Summary:
    """The summary of all, once every process is done and the output is whole; it is told by files.

    A collective operation would time out where one process has much more to do than another.
    """
    if processes == 1:
        record.finish(summary)
        return summary
    output = record.output
    with replacing(_done(part)) as work:
        work.write_text(json.dumps(asdict(summary)), encoding="utf-8")
    if index > 0:
        while (finished := record.finished) is None:
            time.sleep(POLL_SECONDS)
        return Summary(**finished)
    parts = [part_of(output, other, processes) for other in range(processes)]
    while not all(_done(each).exists() for each in parts):
        time.sleep(POLL_SECONDS)
    with replacing(output) as work, work.open("wb") as file:
        for each in parts:
            with each.open("rb") as lines:
                while block := lines.read(1 << 20):
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
    whole = Summary.together(
        [Summary(**json.loads(_done(each).read_text(encoding="utf-8"))) for each in parts]
    )
    record.finish(whole)
    for each in parts:
        for path in (each, _done(each)):
            path.unlink(missing_ok=True)
    return whole


def _done(part: Path) -> Path:
    return part.with_name(f"{part.name}.done")
