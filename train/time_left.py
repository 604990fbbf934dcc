"""Estimates the time that a run has left."""

from statistics import fmean

FORWARD = 1 / 3
"""The compilation of an evaluation's batch, relative to that of a step's: it has no backward pass."""


class TimeLeft:
    """Estimates the seconds left from the steps and evaluations so far.

    Compilation does not count as a step's time: widths that are still to come are compiled once each. Before
    the first evaluation, its time follows from the tokens that it computes.

    Args:
        evaluation_steps: the time of an evaluation in steps.
    """

    def __init__(self, evaluation_steps: float):
        self._evaluation_steps = evaluation_steps
        self._steps, self._step_seconds = 0, 0.0
        self._compiling: list[tuple[float, int]] = []
        self._evaluations: list[float] = []

    def add_step(self, seconds: float, new_widths: int) -> None:
        """Records a step, and how many of its widths were compiled for it."""
        if new_widths:
            self._compiling.append((seconds, new_widths))
        else:
            self._steps += 1
            self._step_seconds += seconds

    def add_evaluation(self, seconds: float, new_widths: int = 0) -> None:
        """Records an evaluation with the checkpoint that follows it, and how many widths were compiled."""
        compilation = FORWARD * self._seconds_of_a_width() * new_widths
        self._evaluations.append(max(seconds - compilation, 0.0) if new_widths else seconds)

    def _seconds_of_a_step(self) -> float:
        return self._step_seconds / max(self._steps, 1)

    def _seconds_of_a_width(self) -> float:
        """Returns the time of a width's compilation, for a step."""
        compiled = sum(number for _, number in self._compiling)
        spent = sum(max(0.0, seconds - self._seconds_of_a_step()) for seconds, _ in self._compiling)
        return spent / compiled if compiled else 0.0

    def seconds(
        self, steps: int, evaluations: float, widths: int = 0, evaluation_widths: int = 0
    ) -> float | None:
        """Returns the seconds left, or None until a step was taken that compiled nothing.

        Args:
            steps: left.
            evaluations: left.
            widths: of steps, that are not compiled yet.
            evaluation_widths: of evaluations, that are not compiled yet.
        """
        if steps and not self._steps:
            return None
        step = self._seconds_of_a_step()
        evaluation = fmean(self._evaluations[-3:]) if self._evaluations else self._evaluation_steps * step
        compilation = (widths + FORWARD * evaluation_widths) * self._seconds_of_a_width()
        return steps * step + evaluations * evaluation + compilation
