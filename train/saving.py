"""Decides after which steps a run writes a checkpoint."""

from dataclasses import dataclass

from .settings import Settings


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

    @classmethod
    def from_settings(cls, settings: Settings, *, epoch: int, total: int) -> "SavePlan":
        """Returns the plan of a run whose epochs have `epoch` steps, and which has `total` of them."""
        every = epoch if settings.save_strategy == "epoch" else settings.save_steps
        return cls(settings.save_strategy, every or settings.eval_steps or epoch, total)

    @property
    def last(self) -> int:
        """How many checkpoints stay beside the best: those from which a killed run resumes."""
        return 1 if self.strategy == "best" else 2

    def saves(self, step: int, *, evaluated: bool, best: bool, interrupted: bool) -> bool:
        """Returns whether this step is saved.

        Args:
            step: how many steps are done.
            evaluated: whether the run evaluates after this step.
            best: whether this evaluation is better than all before.
            interrupted: whether a signal ends the run after this step.
        """
        if self.strategy == "no":
            return False
        if best or interrupted:
            return True
        if self.strategy == "best":
            return False
        of_steps = evaluated and self.strategy == "steps"
        return of_steps or step % self.every == 0 or step == self.total
