"""Scores of retrieval tasks by rope, task, length and depth."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from phi3_jax.rope_lab.retrieval.measure import Trial


def score(trials: Sequence[Trial]) -> float:
    """Returns the mean score."""
    return sum(trial.score for trial in trials) / len(trials)


class TrialGrid:
    """Trials by rope, task, length and depth, in their order."""

    def __init__(self, trials: Sequence[Trial]):
        self.trials = trials
        self.ropes = list(dict.fromkeys(trial.rope for trial in trials))
        self.tasks = list(dict.fromkeys(trial.task for trial in trials))
        self.lengths = list(dict.fromkeys(trial.length for trial in trials))
        self._depths: defaultdict[str, dict[float | None, None]] = defaultdict(dict)
        self._cells: defaultdict[tuple[str, str, int, float | None], list[Trial]] = defaultdict(list)
        for trial in trials:
            self._depths[trial.task][trial.depth] = None
            self._cells[trial.rope, trial.task, trial.length, trial.depth].append(trial)

    def depths(self, task: str) -> list[float | None]:
        """Returns the depths of a task; one None if it has no depth."""
        return list(self._depths[task])

    def has_depth(self, task: str) -> bool:
        return self.depths(task) != [None]

    def cell(self, rope: str, task: str, length: int, depth: float | None) -> list[Trial]:
        return self._cells[rope, task, length, depth]

    def at(self, rope: str, task: str, length: int) -> list[Trial]:
        """Returns the trials of all depths."""
        return [trial for depth in self.depths(task) for trial in self.cell(rope, task, length, depth)]

    def scores(self, rope: str, task: str) -> Float[np.ndarray, " lengths"]:
        """Returns the mean scores by length."""
        return np.array([score(self.at(rope, task, length)) for length in self.lengths])

    def scores_by_depth(self, rope: str, task: str) -> Float[np.ndarray, "depths lengths"]:
        """Returns the mean scores by depth and length."""
        return np.array(
            [
                [score(self.cell(rope, task, length, depth)) for length in self.lengths]
                for depth in self.depths(task)
            ]
        )

    def averages(self, rope: str) -> Float[np.ndarray, " lengths"]:
        """Returns the mean of all tasks by length, as RULER (arXiv:2404.06654, section 4) averages them."""
        return np.mean([self.scores(rope, task) for task in self.tasks], axis=0)
