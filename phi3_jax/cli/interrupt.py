"""Stops an answer on Ctrl-C."""

import signal
from types import FrameType
from typing import Any

from phi3_jax.parallel.distributed import from_primary, process_count

PIECES = 8
"""The pieces of an answer between two messages in which process 0 says whether to stop."""


class Interrupt:
    """Records Ctrl-C within its block; only a second one raises KeyboardInterrupt.

    An exception raised at any point could leave the cache inconsistent, or be lost in a callback of the
    garbage collector.
    """

    def __enter__(self) -> "Interrupt":
        self.stopped = False
        self._seen, self._pieces = False, 0
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def stops(self) -> bool:
        """Returns whether to stop after this piece of the answer; process 0 decides for all."""
        self._pieces += 1
        if process_count() == 1 or self._pieces % PIECES == 0:
            self.stopped = from_primary(lambda: self._seen)
        return self.stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            raise KeyboardInterrupt
        self._seen = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
