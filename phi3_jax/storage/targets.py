"""What is written or was written before: a local path, or the URL of a file in a store."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from phi3_jax.storage.objects import IN_FLIGHT
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


def names_in(directory: Target) -> list[str]:
    """Returns the names of the files and folders in a directory, sorted; none if it does not exist.

    Raises:
        StorageError: the store cannot be asked.
    """
    if (folder := local_target(directory)) is not None:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    url = os.fspath(directory)
    path = split_url(url)[1]
    with clear_errors(url):
        try:
            found = store_of(url).ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    paths = {str(each).strip("/") for each in found} - {path.strip("/")}  # a store may list the folder itself
    return sorted(each.rpartition("/")[2] for each in paths)


def files_below(url: str) -> list[str]:
    """Returns the paths of all files of a store's folder and of the folders in it, relative to it, sorted.

    Raises:
        StorageError: the store cannot be asked.
    """
    path = split_url(url)[1]
    with clear_errors(url):
        found = [str(each) for each in store_of(url).find(path)]
    start = len(path.strip("/")) + 1
    return sorted(name for each in found if (name := each.strip("/")[start:]))


def remove_folder(directory: Target, *, first: str = "") -> None:
    """Deletes a directory with all that is in it, if there is one; of a local one, what can be deleted.

    Args:
        directory: a path or a URL.
        first: the name of a file that leaves a store's folder before all others.

    Raises:
        StorageError: the store does not delete a file.
    """
    if (folder := local_target(directory)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    url = os.fspath(directory).rstrip("/")
    names = files_below(url)
    if first in names:
        remove(f"{url}/{first}")
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(lambda name: remove(f"{url}/{name}"), [name for name in names if name != first]))
    store, path = store_of(url), split_url(url)[1]
    with clear_errors(url):
        if store.isdir(path):  # in stores that have folders without files
            store.rm(path, recursive=True)
