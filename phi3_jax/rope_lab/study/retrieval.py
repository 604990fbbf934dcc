"""The retrieval tasks of a study: examples to train on, and the measurement of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.rope_lab.passkey import Case, PasskeyPrompts
from phi3_jax.rope_lab.passkey_report import TrialGrid, write_passkey_report
from phi3_jax.rope_lab.passkey_run import measure_passkeys
from phi3_jax.rope_lab.study.settings import RetrieveSettings
from phi3_jax.storage.targets import Target
from phi3_jax.tokenizer import Phi3Tokenizer

TRAINING_SEED = 7_000_001
"""The seed of the keys that are trained on, which measurements should not have."""


class TrainingPrompts:
    """Makes retrieval tasks with their answers, to train on, without a chat template."""

    def __init__(self, tokenizer: Phi3Tokenizer):
        self._encode = tokenizer.encode
        self._end = tokenizer.eos_token_id
        longest = max(len(self._answer(key)) for key in ("10000", "77777", "99999"))
        self._prompts = PasskeyPrompts(tokenizer, longest, template=False, seed=TRAINING_SEED)

    @property
    def shortest(self) -> int:
        """The least tokens of a task with its answer."""
        return self._prompts.shortest

    def __call__(self, length: int, depth: float, number: int) -> list[int]:
        """Returns the ids of a task of at most `length` tokens, which ends with its answer."""
        prompt = self._prompts(Case(length, depth, number))
        return [*prompt.ids, *self._answer(prompt.key)]

    def _answer(self, key: str) -> list[int]:
        end = [] if self._end is None else [self._end]
        return [*self._encode(f" {key}", add_special_tokens=False), *end]


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
    """Measures a model under a rope; returns for each task and length how many answers are right.

    The journal and the report are in `output`; the same call resumes.
    """
    done = measure_passkeys(
        model,
        output,
        [rope],
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
    write_passkey_report(output, done)
    return [_row("passkey", length, done.trials) for length in TrialGrid(done).lengths]


def _row(task: str, length: int, trials: Sequence[Any]) -> dict[str, Any]:
    found = [trial.found for trial in trials if trial.length == length]
    return {"task": task, "length": length, "right": sum(found), "prompts": len(found)}
