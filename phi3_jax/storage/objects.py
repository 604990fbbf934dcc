"""Reads files in ranges: local ones, and those of stores, several ranges at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from phi3_jax.storage.urls import (
    ChangedError,
    RemoteEntry,
    StorageError,
    clear_errors,
    find_entry,
    split_url,
    store_of,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CHUNK = 1 << 23
"""The most bytes of one request."""

IN_FLIGHT = 8
"""The most requests at a time."""

Piece = tuple[int, memoryview]
"""An offset in a file, and the memory for the bytes from there."""


class RangedFile(Protocol):
    """A file that does not change while it is read; its text is its path or URL."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    def read(self, pieces: Sequence[Piece]) -> None:
        """Reads pieces into their memory.

        Raises:
            EOFError: the file ends before one of them does.
        """
        ...

    def check(self) -> None:
        """Checks that the file is the one that was found.

        Raises:
            ChangedError: it changed, or was removed.
        """
        ...


class LocalFile:
    """A file on a disk.

    Raises:
        OSError: there is none.
    """

    def __init__(self, path: Path):
        self.path = path
        self._found = self._state()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self._found[0]

    def read(self, pieces: Sequence[Piece]) -> None:
        # Read, not mapped: the pages of a mapped file would stay in memory beside the copy.
        with self.path.open("rb") as file:
            for offset, memory in pieces:
                file.seek(offset)
                if file.readinto(memory) != len(memory):
                    raise EOFError

    def check(self) -> None:
        if not self.path.exists() or self._state() != self._found:
            raise ChangedError(f"{self} changed while it was read; start again when nothing writes it")

    def _state(self) -> tuple[int, int, int]:
        state = self.path.stat()
        return state.st_size, state.st_mtime_ns, state.st_ino


class RemoteFile:
    """A file of a store, which does not change while it is read.

    Args:
        entry: what the store said of it when it was found.
    """

    def __init__(self, entry: RemoteEntry):
        self.entry = entry
        self._files: AbstractFileSystem | None = None

    def __str__(self) -> str:
        return self.entry.url

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def size(self) -> int:
        return self.entry.size

    def read(self, pieces: Sequence[Piece]) -> None:
        """Reads pieces into their memory, several at a time.

        Raises:
            StorageError: the store does not give them, even when asked again.
            ChangedError: the file was removed or became shorter.
        """
        if self._files is None:
            self._files = store_of(self.entry.url)
        path = split_url(self.entry.url)[1]
        chunks = [chunk for offset, memory in pieces for chunk in _chunks(offset, memory)]
        for first in range(0, len(chunks), IN_FLIGHT):
            batch = chunks[first : first + IN_FLIGHT]
            starts = [offset for offset, _ in batch]
            stops = [offset + len(memory) for offset, memory in batch]
            try:
                with clear_errors(self.entry.url):
                    answers = self._files.cat_ranges([path] * len(batch), starts, stops, on_error="raise")
            except FileNotFoundError:
                raise ChangedError(f"{self} was removed while it was read; put it back") from None
            for (_, memory), answer in zip(batch, answers, strict=True):
                if len(answer) != len(memory):
                    self.check()
                    raise StorageError(f"{self}: the store gave {len(answer)} of {len(memory)} bytes")
                memory[:] = answer

    def check(self) -> None:
        if find_entry(self.entry.url) != self.entry:
            raise ChangedError(f"{self} changed while it was read; start again when nothing writes it")


def _chunks(offset: int, memory: memoryview) -> list[Piece]:
    return [(offset + start, memory[start : start + CHUNK]) for start in range(0, len(memory), CHUNK)]
