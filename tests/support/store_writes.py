"""Counts the writes to a store in memory, and ends a process at one of them as a kill would."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest


class Killed(BaseException):
    """Stands for a kill."""


@contextmanager
def killed_at(write: int) -> Iterator[None]:
    """Ends the block at a write to a store in memory, without any write after it.

    Every write is counted twice, since the kill may come before it and after it.
    """
    files = type(fsspec.filesystem("memory"))
    count = 0

    def watched(name: str) -> Any:
        act = getattr(files, name)

        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > write:
                raise Killed
            result = act(self, *arguments, **options)
            count += 1
            if count > write:
                raise Killed
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "put_file", "rm_file"):
            patch.setattr(files, name, watched(name))
        try:
            yield
        except Killed:
            pass
        else:
            assert count <= write, "the kill was caught"
