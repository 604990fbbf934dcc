"""SIGTERM and Ctrl-C during a run: it ends after a step or a batch of an evaluation, with its state saved."""

import signal
from itertools import count
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """Notes the signals that end a run; used in `with`. A second Ctrl-C ends it at once.

    With several processes, JAX's preemption service notes the signal, and all processes agree on the question
    to which the answer is yes (see `phi3_jax.parallel.distributed.start`).
    """

    _questions = count()
    """Numbers for JAX's service, which must never become smaller."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal's number."""

    def __enter__(self) -> "Interrupts":
        self._handlers = {number: signal.signal(number, self._note) for number in self._signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        """Returns whether the run ends here; all processes ask equally often, and get the same answer."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(next(self._questions)):
                self.received = signal.SIGTERM
                return True
            return False
        return self.received is not None

    @staticmethod
    def _signals() -> tuple[signal.Signals, ...]:
        # With several processes the service handles SIGTERM, and Ctrl-C ends all of them.
        return () if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
