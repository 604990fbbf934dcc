"""Perplexity of a text at a context length, by windows that slide over it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import Progress, Scorer, frequencies_for


class Window(NamedTuple):
    """The tokens [begin, end) of a text, of which those from `scored_from` on are scored."""

    begin: int
    end: int
    scored_from: int

    @property
    def scored(self) -> int:
        return self.end - self.scored_from


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Windows of `length` tokens, `stride` apart, that score every token but the first once.

    The recipe of transformers' page on perplexity: the first window scores all its tokens but the first,
    later ones the last `stride`, which see at least `length - stride` tokens before them; the last window
    ends with the text, and may be shorter. (That page counts one token too few for every window but the
    first.) Windows side by side, `stride` = `length`, leave out the first token of each.

    Raises:
        ValueError: fewer than two tokens, a length below 2, a stride that would leave tokens out.
    """
    if tokens < 2:
        raise UserError(f"the text has {tokens} tokens; perplexity needs at least 2")
    if length < 2:
        raise UserError(f"length={length} must be at least 2")
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must be from 1 to the length, {length}: it would leave tokens out")
    found = []
    scored_from = 1
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        if max(scored_from, begin + 1) < end:
            found.append(Window(begin, end, max(scored_from, begin + 1)))
        scored_from = end
        if end == tokens:
            break
    return found


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text."""

    loss: float
    """The sum of -log p, in nats."""
    tokens: int
    """That were predicted."""

    def __add__(self, other: "TextLoss") -> "TextLoss":
        return TextLoss(self.loss + other.loss, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        """Infinite where it is more than a float holds."""
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
    progress: Progress | None = None,
) -> Iterator[tuple[Window, TextLoss]]:
    """Each window of a text with its loss, under the rope of `config`.

    Longrope's list and dynamic NTK's base are chosen by a window's whole length, as in transformers.

    Raises:
        ValueError: as `windows`; a length that memory cannot hold, before any work.
    """
    found = windows(len(tokens), length, stride)
    scorer.check_memory(max(window.end - window.begin for window in found))
    for window in found:
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
    progress: Progress | None = None,
) -> TextLoss:
    """The loss of a whole text.

    Args:
        config: whose rope is used; default: the model's own.
        length: of the windows; default: the context that the config has.
        stride: between windows; default: half the length.

    Raises:
        ValueError: as `sliding_losses`.
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
