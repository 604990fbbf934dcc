"""Files that change as a whole, and the leftovers of killed processes."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, REPLACED = ".partial", ".replaced"
"""Endings of hidden files and directories: those being written, and those moved away for new ones."""


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a temporary path, whose file replaces `path` when the block ends, unless it raised.

    A killed process leaves the temporary file; `remove_leftovers` deletes it.

    Args:
        sync: wait until the file is on the disk.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield work
        if sync:
            with work.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Writes a file of text as `replacing` does."""
    with replacing(path, sync=sync) as work:
        work.write_text(text, encoding="utf-8")


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Deletes the temporary files of killed processes, for files whose names start with `name`.

    No other process may be writing them.
    """
    for ending in (PARTIAL, REPLACED):
        for path in directory.glob(f".{glob.escape(name)}*{ending}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
