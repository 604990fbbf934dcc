"""The retrieval tasks of a study: examples to train on, and the measurement of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.rope_lab.retrieval.prompts import Case, RetrievalPrompts
from phi3_jax.rope_lab.retrieval.report import write_retrieval_report
from phi3_jax.rope_lab.retrieval.run import run_retrieval
from phi3_jax.rope_lab.retrieval.scores import TrialGrid
from phi3_jax.rope_lab.retrieval.tasks import Task
from phi3_jax.rope_lab.study.settings import RetrieveSettings
from phi3_jax.storage.targets import Target
from phi3_jax.tokenizer import Phi3Tokenizer

TRAINING_SEED = 7_000_001
"""The seed of the keys that are trained on, which measurements should not have."""


class TrainingPrompts:
    """Makes retrieval tasks in turns, with their answers, to train on, without a chat template."""

    def __init__(self, tokenizer: Phi3Tokenizer, tasks: Sequence[Task]):
        self._encode = tokenizer.encode
        self._end = tokenizer.eos_token_id
        self._tasks = tasks
        self._prompts = RetrievalPrompts(tokenizer, tasks, raw=True, seed=TRAINING_SEED)

    @property
    def shortest(self) -> int:
        """The least tokens with which each of the tasks can be made."""
        return self._prompts.shortest

    def __call__(self, length: int, depth: float, number: int) -> list[int]:
        """Returns the ids of a task of at most `length` tokens, which ends with its answer."""
        task = self._tasks[number % len(self._tasks)]
        prompt = self._prompts(Case(task.name, length, depth if task.has_depth else None, number))
        end = [] if self._end is None else [self._end]
        return [*prompt.ids, *self._encode(prompt.right_answer, add_special_tokens=False), *end]


def measure_retrieval(
    model: Path,
    output: Target,
    rope: RopeArgument,
    settings: RetrieveSettings,
    *,
    raw: bool,
    dtype: str,
    mesh: Mesh | None,
    show: bool,
) -> list[dict[str, Any]]:
    """Measures a model under a rope; returns the sum of scores for each task and length.

    The journal and the report are in `output`; the same call resumes.
    """
    done = run_retrieval(
        model,
        output,
        [rope],
        tasks=settings.make_tasks(),
        lengths=settings.lengths,
        depths=settings.depths,
        trials=settings.trials,
        max_new_tokens=settings.max_new_tokens,
        raw=raw,
        seed=settings.seed,
        dtype=dtype,
        mesh=mesh,
        show=show,
    )
    write_retrieval_report(output, done)
    grid = TrialGrid(done.trials)
    rows = []
    for task in grid.tasks:
        for length in grid.lengths:
            scores = [trial.score for trial in grid.at(rope.name, task, length)]
            rows.append({"task": task, "length": length, "right": sum(scores), "prompts": len(scores)})
    return rows
