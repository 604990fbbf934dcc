"""What a long measurement has found so far, in a file that a kill leaves whole."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from phi3_jax.errors import UserError
from phi3_jax.runs.files import differences, remove_leftovers, replacing
from phi3_jax.runs.json_values import json_value


class Journal:
    """Entries in the order in which they were found, and what they follow from; a context manager.

    The file changes as a whole and is on the disk when `add` returns. Entered again with the same `asked`, it
    has the entries of before. One process at a time has it.

    Args:
        path: a JSON file; its directory is made, and goes again if nothing comes to lie in it.
        asked: all that the entries follow from, for JSON.
        overwrite: begin anew where the file tells of something else, or is broken.

    Raises:
        ValueError: the file tells of something else, or is broken; another process has it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], *, overwrite: bool = False):
        self.path, self.entries = path, list[Any]()
        self._asked = json.loads(json.dumps(json_value(asked)))
        self._chosen: dict[str, Any] = {}
        self._overwrite = overwrite
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._made_directory = False

    def __enter__(self) -> "Journal":
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent} is a file; name a directory for the output")
        self._made_directory = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is writing to {self.path.parent}") from None
        try:
            remove_leftovers(self.path.parent, self.path.name)
            if self.path.exists():
                self._read()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
        if self._made_directory:
            with suppress(OSError):  # something is in it
                self.path.parent.rmdir()

    def chosen(self, name: str, choose: Callable[[], Any]) -> Any:
        """What was chosen when the work began, or is chosen now: what depends on the machine's state."""
        if name not in self._chosen:
            self._chosen[name] = choose()
        return self._chosen[name]

    def add(self, entries: Iterable[Any]) -> None:
        """Puts entries, for JSON, behind the others."""
        self.entries.extend(entries)
        values = {"asked": self._asked, "chosen": self._chosen, "entries": self.entries}
        with replacing(self.path) as work, work.open("w", encoding="utf-8") as file:
            json.dump(json_value(values), file, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        advice = "choose another output, or give --overwrite to begin anew"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before, chosen, entries = found["asked"], found["chosen"], found["entries"]
            changed = differences(before, self._asked)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if self._overwrite:
                return
            raise UserError(f"{self.path} is broken ({error!r}); {advice}") from error
        if not changed:
            self._chosen, self.entries = chosen, entries
        elif not self._overwrite:
            raise UserError(
                f"{self.path} was begun with something else, and cannot be gone on with: "
                f"{'; '.join(changed)}. To keep it, {advice}"
            )
