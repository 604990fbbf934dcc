"""Checkpoints in stores that Orbax does not write to: it writes to a local folder, whose files are copied."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from phi3_jax.storage.fetch import download
from phi3_jax.storage.objects import IN_FLIGHT, RemoteFile
from phi3_jax.storage.outputs import put, write_bytes
from phi3_jax.storage.targets import exists, files_below, names_in, remove_folder
from phi3_jax.storage.urls import find_entry

COMMITTED = "commit_success.txt"
"""The file of a checkpoint in a store that arrives last and leaves first; without it, parts may lack."""


def committed_steps(url: str) -> list[int]:
    """Returns the steps that have a complete checkpoint in a store's folder, ascending.

    Raises:
        StorageError: the store cannot be asked.
    """
    return sorted(int(name) for name in _numbers(url) if exists(f"{url}/{name}/{COMMITTED}"))


class Mirror:
    """A local folder of checkpoints, and its copy in a store.

    Args:
        url: of the store's folder.
        folder: an empty local one.
    """

    def __init__(self, url: str, folder: Path):
        self._url, self.folder = url, folder

    def pull(self) -> None:
        """Copies the complete checkpoints of the store, and deletes others there.

        Raises:
            StorageError: the store cannot be read or written.
        """
        committed = {str(step) for step in committed_steps(self._url)}
        for name in _numbers(self._url):
            if name in committed:
                self._fetch(name)
            else:
                remove_folder(f"{self._url}/{name}")

    def push(self, steps: Iterable[int]) -> None:
        """Writes the checkpoints of these steps that the store lacks, and deletes all others there.

        Raises:
            StorageError: the store cannot be read or written.
        """
        here, there = {str(step) for step in steps}, {str(step) for step in committed_steps(self._url)}
        for name in sorted(here - there):
            remove_folder(f"{self._url}/{name}")  # a part of it that a failed attempt left
            step, mark = self.folder / name, self.folder / name / COMMITTED  # which Orbax writes, too
            paths = [path for path in sorted(step.rglob("*")) if path.is_file() and path != mark]
            put(paths, [f"{self._url}/{path.relative_to(self.folder).as_posix()}" for path in paths])
            write_bytes(f"{self._url}/{name}/{COMMITTED}", b"")
        for name in there - here:
            remove_folder(f"{self._url}/{name}", first=COMMITTED)

    def _fetch(self, step: str) -> None:
        def fetch(name: str) -> None:
            entry = find_entry(f"{self._url}/{step}/{name}")
            if entry is not None:
                path = self.folder / step / name
                path.parent.mkdir(parents=True, exist_ok=True)
                download(RemoteFile(entry), path)

        names = [name for name in files_below(f"{self._url}/{step}") if name != COMMITTED]
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(fetch, names))


def _numbers(directory: Path | str) -> list[str]:
    return [name for name in names_in(directory) if name.isdecimal()]
