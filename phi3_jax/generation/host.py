"""Logits processors that run on the host: transformers' kind, called with NumPy arrays at every step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.errors import UserError
from phi3_jax.generation.processors import LogitsProcessor, LogitsProcessorList
from phi3_jax.generation.sequences import Sequences


class HostProcessors:
    """Runs the part of a chain that cannot be compiled, as one function of sequences and scores.

    Args:
        processors: those on the host and those between them.
        rows: the number of rows without padding rows.
        full_ids: returns the rows as transformers has them.
    """

    def __init__(
        self,
        processors: Sequence[Any],
        rows: int,
        full_ids: Callable[[Sequences], Int[np.ndarray, "R length"]],
    ):
        self._processors, self._rows, self._full_ids = processors, rows, full_ids

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ids = self._full_ids(sequences)
        for processor in self._processors:
            if isinstance(processor, LogitsProcessor):
                scores = processor(sequences.first(len(scores)), scores)
                continue
            old = np.array(scores)[: self._rows]
            new = np.asarray(processor(ids, old), np.float32)
            if new.shape != old.shape:
                name = getattr(processor, "__name__", type(processor).__name__)
                raise UserError(
                    f"logits processor {name} returned scores of shape {new.shape}; expected {old.shape}"
                )
            scores = jnp.asarray(scores).at[: self._rows].set(new)
        return scores


class PrefixConstraint:
    """Calls `prefix_allowed_tokens_fn(row of the batch, its ids)` for every row at every step.

    Where no beam of a prompt has an allowed token with a finite score, the allowed ones are forced, as in the
    reference.
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
        stuck = np.isneginf(allowed.max(axis=1)).reshape(-1, self._num_beams).all(axis=1)
        return np.where(np.repeat(stuck, self._num_beams)[:, None], mask, allowed)


def split_at_host(
    processors: Sequence[Any],
) -> tuple[LogitsProcessorList, Sequence[Any], LogitsProcessorList]:
    """Splits a chain before the first processor that runs on the host and after the last one."""
    host = [index for index, each in enumerate(processors) if not isinstance(each, LogitsProcessor)]
    if not host:
        return LogitsProcessorList(processors), (), LogitsProcessorList()
    first, last = host[0], host[-1] + 1
    before, after = LogitsProcessorList(processors[:first]), LogitsProcessorList(processors[last:])
    return before, processors[first:last], after
