"""Scores many texts, the short ones several at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.evaluation.scorer import OnProgress, Scorer, frequencies_for

TOKENS, TOKENS_ON_CPU = 16384, 2048
"""Approximate tokens of all rows that are scored together; a CPU gains little from more."""


class Part(NamedTuple):
    """Tokens of a text; those from `scored_from` on are scored."""

    tokens: Int[np.ndarray, " T"]
    scored_from: int = 1
    rope_length: int | None = None
    """The length that the frequencies are for; default: all tokens."""


class PartScores(NamedTuple):
    """Scores of the scored tokens of a `Part`."""

    losses: Float[np.ndarray, " scored"]
    """-log p, float32, in nats."""
    greedy: Bool[np.ndarray, " scored"]
    """Whether each token is the most likely one."""

    @property
    def loss(self) -> float:
        """The sum of the losses, in float64."""
        return float(self.losses.sum(dtype=np.float64))


def score_all(
    scorer: Scorer,
    parts: Sequence[Part],
    config: Phi3Config,
    *,
    initial_tokens: int = 0,
    progress: OnProgress | None = None,
) -> Iterator[tuple[int, PartScores]]:
    """Yields the number and the scores of each part, under the rope of `config`; the longest come first.

    Rows have few sizes, so that few programs are compiled for any texts.

    Raises:
        UserError: a part does not fit in memory; it is raised before any work.
    """
    order = sorted(range(len(parts)), key=lambda number: -len(parts[number].tokens))
    if order:
        longest = len(parts[order[0]].tokens)
        scorer.check_memory(longest, _rows(scorer, longest))
    while order:
        longest = len(parts[order[0]].tokens)
        rows = _rows(scorer, longest)
        # Parts that a narrower program can score come later.
        fitting = [n for n in order[:rows] if scorer.padded(len(parts[n].tokens)) == scorer.padded(longest)]
        batch, order = order[: len(fitting)], order[len(fitting) :]
        tokens = np.zeros((rows, longest), np.int32)
        frequencies = []
        for row, number in enumerate([*batch, *batch[:1] * (rows - len(batch))]):
            part = parts[number]
            tokens[row, : len(part.tokens)] = part.tokens
            frequencies.append(frequencies_for(config, part.rope_length or len(part.tokens)))
        inv_freq, scaling = (np.stack(each) for each in zip(*frequencies, strict=True))
        scored_from = min(parts[number].scored_from for number in batch)
        losses, greedy = scorer.score(
            tokens, inv_freq, scaling, initial_tokens=initial_tokens, scored_from=scored_from
        )
        for row, number in enumerate(batch):
            part = parts[number]
            here = np.s_[row, part.scored_from - scored_from : len(part.tokens) - scored_from]
            yield number, PartScores(losses[here], greedy[here])
            if progress is not None:
                progress(len(part.tokens))


def _rows(scorer: Scorer, length: int) -> int:
    """Returns how many rows of a length are scored together."""
    tokens = TOKENS_ON_CPU if scorer.compiled.on_cpu else TOKENS
    return max(1, tokens // scorer.padded(length))
