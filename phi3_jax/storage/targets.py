"""What is written or was written before: a local path, or the URL of a file in a store."""

import os
from pathlib import Path, PurePosixPath

from phi3_jax.storage.urls import clear_errors, find_entry, is_url, local_part, split_url, store_of

Target = str | os.PathLike[str]
"""The path or the URL of what is to be written."""


def local_target(target: Target) -> Path | None:
    """Returns the local path of a target; None if it is in a store."""
    name = os.fspath(target)
    if not is_url(name):
        return Path(name)
    path = local_part(name)
    return None if path is None else Path(path)


def target_in(directory: Target, name: str) -> Path | str:
    """Returns the path or the URL of a file in a directory that is to be written."""
    folder = local_target(directory)
    return f"{os.fspath(directory).rstrip('/')}/{name}" if folder is None else folder / name


def suffix_of(target: Target) -> str:
    """Returns the ending of a name, from its last full stop, in small letters."""
    return PurePosixPath(os.fspath(target)).suffix.lower()


def exists(target: Target) -> bool:
    """Whether there is a file of this name.

    Raises:
        StorageError: the store cannot be asked.
    """
    path = local_target(target)
    return find_entry(os.fspath(target)) is not None if path is None else path.exists()


def read_bytes(target: Target) -> bytes:
    """Returns the contents of a file.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the store cannot be read.
    """
    if (path := local_target(target)) is not None:
        return path.read_bytes()
    url = os.fspath(target)
    with clear_errors(url):
        content: bytes = store_of(url).cat_file(split_url(url)[1])
    return content


def remove(target: Target) -> None:
    """Deletes a file, if there is one.

    Raises:
        StorageError: the store does not delete it.
    """
    if (path := local_target(target)) is not None:
        path.unlink(missing_ok=True)
        return
    url = os.fspath(target)
    with clear_errors(url):
        try:
            store_of(url).rm_file(split_url(url)[1])
        except FileNotFoundError:
            return
