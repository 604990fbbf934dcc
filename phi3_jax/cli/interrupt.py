"""Ctrl-C while an answer is made."""

import signal
from types import FrameType
from typing import Any

from phi3_jax.parallel.distributed import from_primary, process_count

PIECES = 8
"""Of an answer between two questions to process 0 whether to stop: each takes the time of a message."""


class Interrupt:
    """Within its block, Ctrl-C is noted, and only a second one raises KeyboardInterrupt.

    Raised anywhere, it would leave the cache in pieces, or be lost in a callback of the garbage collector.
    """

    def __enter__(self) -> "Interrupt":
        self.stopped = False
        self._seen, self._pieces = False, 0
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def stops(self) -> bool:
        """Whether to stop behind this piece of the answer: process 0 says, now and then, for all."""
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
