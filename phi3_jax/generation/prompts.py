"""Prompts of any length and padding brought into a few sizes: lanes of columns, padded on the left."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError

PREFILL_CHUNK = 512
"""Prompt columns computed at a time, so that a prompt's activations are bounded."""


def padded_length(length: int) -> int:
    """Columns for `length` tokens: a power of two from 16 up to 128, above a multiple of 128.

    So the last of a prompt's chunks has one of a few widths, and the others are whole.
    """
    if length > 128:
        return -(-length // 128) * 128
    return max(16, 1 << (length - 1).bit_length())


def cache_length(slots: int) -> int:
    """The cache size for `slots`: in steps of 128 up to 1,024, above in eighths of the next power of two."""
    step = max(128, 1 << max((slots - 1).bit_length() - 3, 0))
    return -(-slots // step) * step


def padded_rows(rows: int, shards: int = 1) -> int:
    """The batch size for `rows`: a power of two up to 8, above a multiple of 8; of `shards` too."""
    padded = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    return -(-padded // shards) * shards


def recomputation_chunk(columns: int) -> int:
    """The largest power of two up to a chunk that divides `columns`."""
    return min(columns & -columns, 1 << (PREFILL_CHUNK.bit_length() - 1))


def checked_prompts(
    config: Phi3Config,
    input_ids: Any,
    attention_mask: Any,
    pad_token_id: int | None,
    end_tokens: Sequence[int],
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Token ids and mask as arrays of [B, T].

    Without a mask, padding is told by its id, as in the reference: unless it is also an end token.

    Raises:
        ValueError: not integers of two dimensions, ids outside the vocabulary, a mask of another shape, a row
            without a token, or one that fills the context.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"input_ids is {ids.dtype}{list(ids.shape)}; expected integers of shape [batch, length]"
        )
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise UserError(f"input_ids has shape {list(ids.shape)}: there is nothing to continue")
    if attention_mask is None:
        told = pad_token_id is not None and pad_token_id not in end_tokens
        mask = ids != pad_token_id if told else np.ones(ids.shape, bool)
    else:
        mask = np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise UserError(
                f"attention_mask has shape {list(mask.shape)}; expected that of input_ids, {list(ids.shape)}"
            )
        mask = mask != 0
    outside = mask & ((ids < 0) | (ids >= config.vocab_size))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UserError(
            f"input_ids[{row}, {column}] = {ids[row, column]} is outside the vocabulary of "
            f"{config.vocab_size} tokens; is this the tokenizer of another model?"
        )
    tokens = mask.sum(axis=1)
    if not tokens.all():
        raise UserError(
            f"row {np.flatnonzero(tokens == 0)[0]} of input_ids is all padding; give it at least one token"
        )
    context = config.context_length
    if tokens.max() >= context:
        raise UserError(
            f"row {tokens.argmax()} has {tokens.max()} tokens and the model's context is {context}; "
            "shorten the prompt"
        )
    return ids.astype(np.int32), mask


class PromptLayout:
    """Where each lane's tokens stand: its columns, padded on the left or behind what a cache holds.

    Attributes:
        ids: int32 [L, P]; mask: [L, P], True where a token stands.
        length: columns used [L]; cached: those that the cache holds already [L].
        columns: for each lane, the columns of its tokens in order.
    """

    def __init__(self, rows: Sequence[Int[np.ndarray, " n"]], cache: KVCache | None = None):
        """`rows` are each lane's tokens, none for a dummy; `cache` holds the beginning of the first."""
        lanes = len(rows)
        self.aligned = cache is None
        self.cached = np.zeros(lanes, np.int32)
        if cache is None:
            width = padded_length(max(map(len, rows)))
            self.columns = [np.arange(width - len(row), width) for row in rows]
        else:
            self.columns = [np.arange(len(row)) for row in rows]
            for lane, slots in enumerate(_cached_columns(cache)):
                known = min(
                    len(slots), len(rows[lane]) - 1
                )  # the last is fed again: its logits are not cached
                used = int(np.asarray(cache.length)[lane]) if known == len(slots) else int(slots[known])
                self.cached[lane] = used
                self.columns[lane] = np.append(slots[:known], used + np.arange(len(rows[lane]) - known))
            width = max(int(columns[-1]) + 1 for columns in self.columns if len(columns))
        self.ids = np.zeros((lanes, width), np.int32)
        self.mask = np.zeros((lanes, width), bool)
        self.length = np.full(lanes, width, np.int32)
        for lane, (row, columns) in enumerate(zip(rows, self.columns, strict=True)):
            self.ids[lane, columns] = row
            self.mask[lane, columns] = True
            self.length[lane] = columns[-1] + 1 if len(columns) else width
        real = self.mask.any(axis=1)
        self.pending = int((self.length - self.cached)[real].max())

    def uncached(self) -> "PromptLayout":
        """The same columns, none of them in a cache."""
        layout = copy.copy(self)
        layout.cached = np.zeros_like(self.cached)
        layout.pending = int(self.length[self.mask.any(axis=1)].max())
        return layout


def _cached_columns(cache: KVCache) -> list[Int[np.ndarray, " n"]]:
    """The columns of the tokens that each row of a cache holds, in order."""
    length, tokens, mask = (np.asarray(x) for x in (cache.length, cache.tokens, cache.mask))
    if mask.shape[1] >= length.max() and (mask.sum(axis=1) == tokens).all():
        return [np.flatnonzero(row[:used]) for row, used in zip(mask, length, strict=True)]
    return [np.arange(used - count, used) for used, count in zip(length, tokens, strict=True)]
