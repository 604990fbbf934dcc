"""SIGTERM and Ctrl-C during a run: it ends behind the step, saved, and not within it."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """Notices that the run shall end; used in `with`. A second Ctrl-C ends it at once.

    Of several processes one is told first, which JAX's preemption service then agrees on with all (see
    `phi3_jax.parallel.distributed.start`).
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal's number."""

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._note) for number in self._signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether the run shall end behind `step`; all processes ask, and hear the same."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.received = signal.SIGTERM
                return True
            return False
        return self.received is not None

    @staticmethod
    def _signals() -> tuple[signal.Signals, ...]:
        # With several processes SIGTERM is the service's, and Ctrl-C ends all.
        return () if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
