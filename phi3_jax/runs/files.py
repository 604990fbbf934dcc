"""Files that change as a whole, and the leftovers of killed processes."""

import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from phi3_jax.errors import UserError

PARTIAL, REPLACED = ".phi3-jax-partial", ".phi3-jax-replaced"
"""Endings of hidden files and directories: those being written, and those moved away for new ones."""


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")


def check_local(path: Path) -> None:
    """Checks that a path to write was not the URL of a file in a store, whose slashes are one here.

    Raises:
        UserError: it was.
    """
    if _URL.match(str(path)):
        raise UserError(
            f"{path} is a URL, and a local path is expected; choose one, or in Python give the URL as text"
        )


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Checks that a command would not write over what it reads, nor two of its outputs into one file.

    Symbolic and hard links count as the file itself. A directory among the inputs stands for its files.

    Args:
        outputs: the files to write, by the names of their options; None is skipped.
        inputs: the files and directories that are read, by name.

    Raises:
        UserError: two of them are one file, or an output is not a regular file, such as a device.
    """
    taken: dict[Hashable, str] = {}
    for name, path in inputs.items():
        if path is not None and path.is_dir():
            taken |= {_identity(each): f"in {name}" for each in path.iterdir()}
        elif path is not None:
            taken[_identity(path)] = f"also {name}"
    for name, path in outputs.items():
        if path is None:
            continue
        check_local(path)
        if path.exists() and not path.is_file():
            raise UserError(f"{name} {path} is not a regular file; choose a file's name")
        identity = _identity(path)
        if identity in taken:
            raise UserError(f"{name} {path} is {taken[identity]}; choose another {name}")
        taken[identity] = f"also {name}"


def _identity(path: Path) -> Hashable:
    """Returns a value that is equal for names of one file."""
    try:
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    except OSError:
        return path.resolve()


def check_writable(directory: Path) -> None:
    """Checks that files can be written in a directory, or that it can be made; leaves nothing behind.

    Raises:
        OSError: they cannot; it has the name of the directory or of its first parent that exists.
    """
    existing = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file replaces `path` when the block ends, unless it raised.

    The file is on the disk before it gets its name, and the name when this returns. A killed process leaves
    the temporary file; `remove_leftovers` deletes it.

    Raises:
        UserError: the path is a URL.
    """
    check_local(path)
    work = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield work
        sync(work)
        os.replace(work, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write does not tell the name
    finally:
        work.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file of text as `replacing` does; bytes of file names that are not UTF-8 are escaped."""
    with replacing(path) as work:
        work.write_text(text, encoding="utf-8", errors="backslashreplace")


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
