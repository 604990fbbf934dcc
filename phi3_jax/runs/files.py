"""Files that change as a whole, and what killed processes leave beside them."""

import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL, REPLACED = ".partial", ".replaced"
"""How hidden files and directories end that are being written, and that make place for others."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, whose file takes the place of `path` if the block ends well and else goes.

    A process killed meanwhile leaves it, which `remove_leftovers` finds.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Deletes what killed processes left half done in a directory, of files whose names begin with `name`.

    Nobody else may be writing them.
    """
    for path in [*directory.glob(f".{name}*{PARTIAL}"), *directory.glob(f".{name}*{REPLACED}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: Set[str] = frozenset()
) -> list[str]:
    """What a run would do otherwise than the one that it goes on with, "name: before -> now".

    What is `free` to change is left out.
    """
    return [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - free)
        if before.get(name) != now.get(name)
    ]
