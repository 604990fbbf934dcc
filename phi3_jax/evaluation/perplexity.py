"""Perplexity of a text at a context length, in sliding windows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import OnProgress, Scorer, frequencies_for


class Window(NamedTuple):
    """The tokens [begin, end) of a text; those from `scored_from` on are scored."""

    begin: int
    end: int
    scored_from: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def scored(self) -> int:
        return self.end - self.scored_from


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Returns windows of `length` tokens, `stride` apart, that score every token but the first once.

    This is the method of transformers' page on perplexity. The first window scores all its tokens but the
    first; later windows score the last `stride`, which see at least `length - stride` earlier tokens. The
    last window ends with the text and may be shorter. (That page counts one token too few for every window
    but the first.) Windows that do not overlap (`stride` = `length`) leave out the first token of each.

    Raises:
        UserError: there are fewer than two tokens, the length is below 2, or the stride would skip tokens.
    """
    if tokens < 2:
        raise UserError(f"the text has {tokens} tokens; perplexity needs at least 2")
    if length < 2:
        raise UserError(f"length={length} must be at least 2")
    if not 1 <= stride <= length:
        raise UserError(
            f"stride={stride} must be from 1 to the length, {length}: otherwise tokens are skipped"
        )
    chosen = []
    scored_from = 1
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        if max(scored_from, begin + 1) < end:
            chosen.append(Window(begin, end, max(scored_from, begin + 1)))
        scored_from = end
        if end == tokens:
            break
    return chosen


@dataclass(frozen=True)
class TextLoss:
    """The loss of a model on a text."""

    loss: float
    """The sum of -log p, in nats."""
    tokens: int
    """How many were predicted."""

    def __add__(self, other: "TextLoss") -> "TextLoss":
        return TextLoss(self.loss + other.loss, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        """The perplexity; infinite if it is too large for a float."""
        mean = self.loss / self.tokens
        return math.exp(mean) if mean < 709 else math.inf


def sliding_losses(
    scorer: Scorer,
    tokens: Int[np.ndarray, " T"],
    config: Phi3Config,
    *,
    length: int,
    stride: int,
    initial_tokens: int = 0,
    progress: OnProgress | None = None,
) -> Iterator[tuple[Window, TextLoss]]:
    """Yields each window of a text with its loss, under the rope of `config`.

    Frequencies that depend on the length are those for the whole window, as in transformers.

    Raises:
        UserError: as `windows`; or the length does not fit in memory, before any work.
    """
    chosen = windows(len(tokens), length, stride)
    scorer.check_memory(max(window.length for window in chosen))
    for window in chosen:
        part = tokens[window.begin : window.end]
        inv_freq, scaling = frequencies_for(config, len(part))
        scores = scorer.score(
            part,
            inv_freq,
            scaling,
            initial_tokens=initial_tokens,
            scored_from=window.scored_from - window.begin,
            progress=progress,
        )
        yield window, TextLoss(float(scores.total[0]), window.scored)


def perplexity(
    scorer: Scorer,
    tokens: Int[np.ndarray, " T"],
    config: Phi3Config | None = None,
    *,
    length: int | None = None,
    stride: int | None = None,
    initial_tokens: int = 0,
    progress: OnProgress | None = None,
) -> TextLoss:
    """Returns the loss of a whole text.

    Args:
        config: its rope is used; default: the model's own config.
        length: tokens of a window; default: the context of the config.
        stride: tokens between windows; default: half the length.

    Raises:
        UserError: as `sliding_losses`.
    """
    config = config or scorer.config
    length = config.context_length if length is None else length
    total = TextLoss(0.0, 0)
    for _, loss in sliding_losses(
        scorer,
        tokens,
        config,
        length=length,
        stride=max(1, length // 2) if stride is None else stride,
        initial_tokens=initial_tokens,
        progress=progress,
    ):
        total += loss
    return total
