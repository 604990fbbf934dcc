"""Outputs in stores as numbered parts, each created once: a store can neither append nor rename."""

import errno
import re

from phi3_jax.storage.targets import read_bytes
from phi3_jax.storage.urls import clear_errors, find_entry, list_entries, split_url, store_of

PART_BYTES = 1 << 24
"""The size from which a part is written."""

PART_SECONDS = 60.0
"""The age of its first content from which a part is written; a kill loses what is not written."""


class Parts:
    """Files of a folder in a store whose names end with numbers, such as part-00000.jsonl; they never change.

    A process that creates each part only after it read all those before it takes part in one sequence with
    all other processes that do so, also with one that others believe to be dead.

    Args:
        folder: the URL of the folder.
        prefix: what names begin with, before the number.
        suffix: what they end with.
    """

    def __init__(self, folder: str, *, prefix: str = "part-", suffix: str = ""):
        self.folder = folder.rstrip("/")
        self._prefix, self._suffix = prefix, suffix
        self._name = re.compile(rf"{re.escape(prefix)}(\d+){re.escape(suffix)}")

    def url(self, number: int) -> str:
        """Returns the URL of a part."""
        return f"{self.folder}/{self._prefix}{number:05}{self._suffix}"

    def numbers(self) -> list[int]:
        """Returns the numbers of the parts that there are, in ascending order.

        Raises:
            StorageError: the store cannot be read.
        """
        names = [self._name.fullmatch(entry.name) for entry in list_entries(self.folder)]
        return sorted(int(name[1]) for name in names if name is not None)

    def read(self, number: int) -> bytes:
        """Returns the contents of a part.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store cannot be read.
        """
        return read_bytes(self.url(number))

    def create(self, number: int, content: bytes) -> bool:
        """Creates a part; returns whether it has this content, and False if another process created it.

        Raises:
            StorageError: the store cannot be written.
        """
        return create_file(self.url(number), content)


def create_file(url: str, content: bytes) -> bool:
    """Creates a file of a store, whole; returns whether it has this content, and False if there is another.

    Of several processes one creates it, on Cloud Storage and S3. Other stores may not know this condition;
    there two processes that create the file at the same moment both believe that they did.

    Raises:
        StorageError: the store cannot be read or written.
    """
    store, path = store_of(url), split_url(url)[1]
    if find_entry(url) is None:
        with clear_errors(url):
            try:
                store.pipe_file(path, content, mode="create")
                return True
            except OSError as error:
                if error.errno == errno.ENOSYS:  # the store does not know the condition
                    store.pipe_file(path, content)
                    return True
                if not isinstance(error, FileExistsError) and error.errno != errno.EINVAL:
                    raise
    # A library that tries again after a lost answer meets its own file.
    return read_bytes(url) == content
