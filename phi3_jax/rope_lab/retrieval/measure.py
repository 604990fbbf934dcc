"""Measures retrieval tasks with a model in memory, under several ropes in the same programs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
from jaxtyping import Float

from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.generation import generate
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.memory import token_bytes, token_capacity
from phi3_jax.generation.prompts import cache_length, padded_length
from phi3_jax.rope_lab.comparison.compare import Rope
from phi3_jax.rope_lab.retrieval.prompts import Case, PromptSize, RetrievalPrompts

ROWS, ROWS_ON_CPU = 16, 4
"""The most prompts at a time; a CPU gains little from more."""

RopeCase = tuple[Rope, Case]
"""A prompt under a rope."""


@dataclass(frozen=True)
class Trial:
    """The answer of a model to a prompt under a rope."""

    rope: str
    task: str
    length: int
    depth: float | None
    trial: int
    answers: tuple[str, ...]
    """What a right answer has."""
    text: str
    """The model's answer."""
    score: float
    """The share of `answers` that the model's answer has."""


def measure_retrieval(
    compiled: CompiledModel,
    prompts: RetrievalPrompts,
    ropes: Sequence[Rope],
    cases: Sequence[Case],
    *,
    batch_size: int | None = None,
) -> list[Trial]:
    """Answers all cases under all ropes with a loaded model; returns the trials in the order of `rope_cases`.

    Args:
        compiled: a model whose config has a context of at least the longest length.
        batch_size: prompts at a time; default: by memory, at most 4 on CPU and 16 elsewhere.

    Raises:
        UserError: a length is too short for its task, is beyond the context or does not fit in memory.
    """
    answerer = Answerer(compiled, prompts, ropes)
    sizes = {prompts.size(case) for case in cases}
    rows = {size: most_rows(compiled, size, batch_size) for size in sorted(sizes, reverse=True)}
    return [
        trial
        for batch in batches(rope_cases(ropes, cases), prompts, rows)
        for trial in answerer.answer(batch, rows[prompts.size(batch[0][1])])
    ]


def rope_cases(ropes: Sequence[Rope], cases: Sequence[Case]) -> list[RopeCase]:
    """Returns each case under each rope, by task, length, rope and case."""
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.task, case.length), []).append(case)
    return [pair for group in groups.values() for pair in product(ropes, group)]


def batches(
    pairs: Iterable[RopeCase], prompts: RetrievalPrompts, rows: Mapping[PromptSize, int]
) -> Iterator[list[RopeCase]]:
    """Yields batches of neighbours with one task and length; `rows` has the most prompts of a batch."""
    for _, group in groupby(pairs, key=lambda pair: (pair[1].task, pair[1].length)):
        same = list(group)
        most = rows[prompts.size(same[0][1])]
        for start in range(0, len(same), most):
            yield same[start : start + most]


class Answerer:
    """Answers batches of prompts of one task and length, whose rows have their own ropes.

    Frequencies that depend on the length are those for the whole length, including the answer's tokens.
    """

    def __init__(self, compiled: CompiledModel, prompts: RetrievalPrompts, ropes: Sequence[Rope]):
        self._compiled, self._prompts = compiled, prompts
        self._positions = max((rope.initial_tokens for rope in ropes), default=0)

    def answer(self, batch: Sequence[RopeCase], rows: int) -> list[Trial]:
        """Returns the trials of a batch, which is padded to `rows` so that one program serves all."""
        padded = [*batch, *[batch[0]] * (rows - len(batch))]
        prompts = {case: self._prompts(case) for _, case in batch}
        ids = np.array([prompts[case].ids for _, case in padded], np.int32)
        case = batch[0][1]
        out = generate(
            self._compiled,
            ids,
            np.ones_like(ids),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=self._prompts.size(case).answer_tokens,
            **self._frequencies([rope for rope, _ in padded], case.length),
        )
        trials = []
        for (rope, case), row in zip(batch, np.asarray(out), strict=False):
            text = self._prompts.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
            answers = prompts[case].answers
            trials.append(Trial(rope.name, *case, answers, text, self._prompts.score(case, answers, text)))
        return trials

    def _frequencies(self, ropes: Sequence[Rope], length: int) -> dict[str, Float[np.ndarray, "..."]]:
        """Returns `inv_freq` and `attention_scaling` of rows with these ropes, as `generate` takes them.

        They are given by position if any rope keeps initial tokens unscaled; the last position stands for all
        later ones.
        """
        rows = [frequencies_for(rope.config, length) for rope in ropes]
        inv_freq = np.stack([each for each, _ in rows])  # [B, P]
        if self._positions:
            plain = self._compiled.model.config.rope_base.inv_freq()
            initial = np.array([rope.initial_tokens for rope in ropes])
            unscaled = np.arange(self._positions + 1) < initial[:, None]  # [B, S]
            inv_freq = np.where(unscaled[:, :, None], plain, inv_freq[:, None])
        return {"inv_freq": inv_freq, "attention_scaling": np.array([scaling for _, scaling in rows])}


def most_rows(compiled: CompiledModel, size: PromptSize, wanted: int | None) -> int:
    """Returns how many prompts of a size, with their answers, fit in memory at a time.

    Raises:
        UserError: not even one, or fewer than are wanted.
    """
    length, answer_tokens = size
    slots = cache_length(padded_length(length - answer_tokens) + answer_tokens + 1)
    room = token_capacity(compiled)
    needed = compiled.rows_for(wanted or 1) * slots
    if needed > room:
        each = token_bytes(compiled)
        texts = (
            f"{wanted} prompts of {length:,} tokens need"
            if wanted
            else f"a prompt of {length:,} tokens needs"
        )
        raise UserError(
            f"{texts} {needed * each / 2**30:.2f} GiB for keys and values, and memory has "
            f"{room * each / 2**30:.2f} GiB for them; choose shorter lengths or a smaller --batch-size"
        )
    if wanted:
        return wanted
    most = ROWS_ON_CPU if compiled.on_cpu else ROWS
    while compiled.rows_for(most) * slots > room and most > 1:
        most //= 2
    return most
