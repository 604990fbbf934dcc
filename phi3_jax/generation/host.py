"""Logits processors that run on the host: transformers' kind, called with NumPy arrays after every step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.errors import UserError
from phi3_jax.generation.processors import LogitsProcessor, LogitsProcessorList
from phi3_jax.generation.sequences import Sequences


class HostProcessors:
    """The part of a chain that cannot be compiled, as one function of sequences and scores.

    Args:
        processors: those on the host and those between them.
        rows: how many rows are real; the rest fill the batch up.
        laid_out: gives the rows as transformers lays them.
    """

    def __init__(
        self,
        processors: Sequence[Any],
        rows: int,
        laid_out: Callable[[Sequences], Int[np.ndarray, "R length"]],
    ):
        self._processors, self._rows, self._laid_out = processors, rows, laid_out

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ids = self._laid_out(sequences)
        for processor in self._processors:
            if isinstance(processor, LogitsProcessor):
                scores = processor(rows_of(sequences, len(scores)), scores)
                continue
            own = np.array(scores)[: self._rows]
            answer = np.asarray(processor(ids, own), np.float32)
            if answer.shape != own.shape:
                name = getattr(processor, "__name__", type(processor).__name__)
                raise UserError(
                    f"logits processor {name} gave scores of shape {answer.shape}; expected {own.shape}"
                )
            scores = jnp.asarray(scores).at[: self._rows].set(answer)
        return scores


class PrefixConstraint:
    """`prefix_allowed_tokens_fn(row of the batch, its ids)`, asked for every row at every step.

    Where a whole group of beams has no allowed token with a finite score, the allowed ones are forced, as in
    the reference.
    """

    def __init__(self, allowed: Callable[[int, np.ndarray], Any], num_beams: int):
        self._allowed, self._num_beams = allowed, num_beams

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        mask = np.full_like(scores, -np.inf)
        for row, ids in enumerate(input_ids):
            tokens = np.asarray(self._allowed(row // self._num_beams, ids), np.int64).reshape(-1)
            if not tokens.size:
                raise UserError(
                    f"prefix_allowed_tokens_fn allows no token for row {row // self._num_beams}; "
                    "it must leave at least one"
                )
            mask[row, tokens] = 0
        allowed = scores + mask
        lost = np.isneginf(allowed.max(axis=1)).reshape(-1, self._num_beams).all(axis=1)
        return np.where(np.repeat(lost, self._num_beams)[:, None], mask, allowed)


def rows_of(sequences: Sequences, rows: int) -> Sequences:
    """The first `rows`: those that make tokens."""
    return jax.tree.map(lambda x: x[:rows], sequences)


def split_at_host(
    processors: Sequence[Any],
) -> tuple[LogitsProcessorList, Sequence[Any], LogitsProcessorList]:
    """The processors before, between and after those that run on the host."""
    host = [index for index, one in enumerate(processors) if not isinstance(one, LogitsProcessor)]
    if not host:
        return LogitsProcessorList(processors), (), LogitsProcessorList()
    first, last = host[0], host[-1] + 1
    before, after = LogitsProcessorList(processors[:first]), LogitsProcessorList(processors[last:])
    return before, processors[first:last], after
