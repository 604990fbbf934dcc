"""The record of a study: which stages are finished, with which options and results."""

from collections.abc import Mapping, Set
from time import monotonic
from types import TracebackType
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.runs.json_values import json_value
from phi3_jax.storage.outputs import check_store_writable
from phi3_jax.storage.resume import RunFile, differences
from phi3_jax.storage.targets import Target, local_target, remove_folder, target_in

RECORD = "study.json"


class StudyRecord:
    """The options, results and seconds of each stage, in a file that a kill leaves whole; a context manager.

    A stage is a folder of its own. Its options are everything that its content depends on, so that a stage
    whose options changed would mix with what is there: it is refused, or starts over with `overwrite`.

    Args:
        output: the directory of the study, or its URL.
        overwrite: start stages over that were started with other options.

    Raises:
        UserError: another process has the study, or its file is broken.
    """

    def __init__(self, output: Target, *, overwrite: bool = False):
        self._output, self._overwrite = output, overwrite
        self._file = RunFile(target_in(output, RECORD), output, {}, overwrite=overwrite)
        self._stages: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "StudyRecord":
        local = local_target(self._output)
        if local is None:
            check_store_writable(str(self._output))
        else:
            if local.exists() and not local.is_dir():
                raise UserError(f"{local} is a file; name a directory for output_dir")
            local.mkdir(parents=True, exist_ok=True)
        self._file.lock()
        try:
            if self._file.exists():
                self._stages = self._file.read(lambda values: dict(values["stages"])) or {}
        except BaseException:
            self._file.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.release()

    def check(self, stages: Mapping[str, Mapping[str, Any]], *, free: Set[str] = frozenset()) -> None:
        """Checks that no stage was started with other options, before any work.

        Args:
            stages: the options of each stage.
            free: options by which a stage continues in its folder, but is not finished any more.

        Raises:
            UserError: one was, and is not to start over; the message names the options of the first.
        """
        changed = {
            name: differences(before["options"], json_value(options), free=free)
            for name, options in stages.items()
            if (before := self._stages.get(name)) is not None
        }
        changed = {name: each for name, each in changed.items() if each}
        if changed and not self._overwrite:
            name, first = next(iter(changed.items()))
            more = f", and so were {len(changed) - 1} stages more" if len(changed) > 1 else ""
            raise UserError(
                f"{self._output}: {name} was started with other options: {'; '.join(first)}{more}. Choose "
                "another output_dir, or give --overwrite to start these stages over"
            )
        for name in changed:
            remove_folder(target_in(self._output, name))
            del self._stages[name]
        if changed:
            self._write()

    def result(self, name: str, options: Mapping[str, Any]) -> Any:
        """Returns the result of a stage that is finished with these options; else None."""
        before = self._stages.get(name)
        return before.get("result") if before and before["options"] == json_value(options) else None

    def seconds(self, name: str) -> float:
        """Returns the time that went into a stage, without that of killed processes."""
        return float(self._stages.get(name, {}).get("seconds", 0.0))

    def working(self, name: str, options: Mapping[str, Any]) -> "_Clock":
        """Returns a context manager for the work on a stage, whose `result` finishes the stage."""
        before = self._stages.get(name, {})
        self._stages[name] = {"options": json_value(options), "seconds": before.get("seconds", 0.0)}
        self._write()
        return _Clock(self, self._stages[name])

    def _write(self) -> None:
        self._file.write(stages=self._stages)


class _Clock:
    """Measures the work on a stage."""

    def __init__(self, record: StudyRecord, stage: dict[str, Any]):
        self._record, self._stage = record, stage
        self.result: Any = None

    def __enter__(self) -> "_Clock":
        self._began = monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stage["seconds"] += round(monotonic() - self._began, 3)
        if error is None:
            self._stage["result"] = json_value(self.result)
        self._record._write()
