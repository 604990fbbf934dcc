"""Decides after which steps a run writes a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from phi3_jax.parallel import distributed

from .settings import Settings

ASK_SECONDS = 10.0
"""How often several processes ask process 0 whether it is time for a checkpoint."""


@dataclass(frozen=True)
class SavePlan:
    """The steps of a run that are saved, by `save_strategy`.

    Except with "no", the best evaluation so far is always saved, because the run keeps its parameters, and so
    is the step after which a signal ends the run.
    """

    strategy: str
    every: int
    """Steps between two checkpoints of "steps" and "epoch"."""
    total: int
    """Steps of the run."""
    limit: int
    """The setting `save_total_limit`."""

    @classmethod
    def from_settings(cls, settings: Settings, *, epoch: int, total: int) -> "SavePlan":
        """Returns the plan of a run whose epochs have `epoch` steps, and which has `total` of them."""
        every = epoch if settings.save_strategy == "epoch" else settings.save_steps
        return cls(
            settings.save_strategy, every or settings.eval_steps or epoch, total, settings.save_total_limit
        )

    @property
    def last(self) -> int:
        """How many checkpoints stay beside the best: those from which a killed run resumes."""
        return 1 if self.strategy == "best" else self.limit

    def saves(self, step: int, *, evaluated: bool, best: bool, interrupted: bool, due: bool = False) -> bool:
        """Returns whether this step is saved.

        Args:
            step: how many steps are done.
            evaluated: whether the run evaluates after this step.
            best: whether this evaluation is better than all before.
            interrupted: whether a signal ends the run after this step.
            due: whether `save_minutes` have passed.
        """
        if self.strategy == "no":
            return False
        if best or interrupted or due:
            return True
        if self.strategy == "best":
            return False
        of_steps = evaluated and self.strategy == "steps"
        return of_steps or step % self.every == 0 or step == self.total


class SaveClock:
    """Tells when `save_minutes` have passed since the last checkpoint.

    Clocks of several processes differ, so process 0 decides. It also chooses the step after which they ask
    again, as each question waits for the devices.

    Args:
        minutes: the setting; None: never.
        clock: returns seconds.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = monotonic):
        self._seconds, self._clock = None if minutes is None else 60 * minutes, clock
        self._start = self._first_asked = clock()
        self._first_step: int | None = None
        self._next_step = 0

    def is_over(self, step: int) -> bool:
        """Returns whether it is time for a checkpoint; all processes call this after each step."""
        if self._seconds is None:
            return False
        if distributed.process_count() == 1:
            return self._clock() - self._start >= self._seconds
        if step < self._next_step:
            return False
        over, self._next_step = distributed.from_primary(lambda: self._decide(step))
        return over

    def restart(self) -> None:
        """Notes that a checkpoint is written now."""
        self._start = self._clock()

    def _decide(self, step: int) -> tuple[bool, int]:
        """Returns whether it is time, and the step after which to ask again."""
        assert self._seconds is not None
        now = self._clock()
        if self._first_step is None:
            self._first_step, self._first_asked = step, now
        done = step - self._first_step
        pace = done / (now - self._first_asked) if done else 0.0  # steps a second
        return now - self._start >= self._seconds, step + max(1, int(pace * ASK_SECONDS))
