"""Ctrl-C while an answer is made."""

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """Within its block, Ctrl-C is noted in `seen`, and only a second one raises KeyboardInterrupt.

    Raised anywhere, it would leave the cache in pieces, or be lost in a callback of the garbage collector.
    """

    def __enter__(self) -> "Interrupt":
        self.seen = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
