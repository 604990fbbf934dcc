"""Brings prompts of any length and padding into a few sizes, padded on the left."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.sizes import power_of_two, round_up

PREFILL_CHUNK = 512
"""Prompt slots computed at a time, which bounds the memory of activations."""


def padded_length(length: int) -> int:
    """Returns the slots for `length` tokens: a power of two from 16 to 128, above that a multiple of 128.

    So the last chunk of a prompt has one of a few widths, and the others are full.
    """
    if length > 128:
        return round_up(length, 128)
    return max(16, 1 << (length - 1).bit_length())


def cache_length(slots: int) -> int:
    """Returns the cache size for `slots`: up to 1,024 in steps of 128, then of eighths of a power of two."""
    step = max(128, 1 << max((slots - 1).bit_length() - 3, 0))
    return round_up(slots, step)


def padded_rows(rows: int, shards: int = 1) -> int:
    """Returns the batch size for `rows`: a power of two up to 8, then a multiple of 8; always of `shards`."""
    padded = power_of_two(rows) if rows <= 8 else round_up(rows, 8)
    return round_up(padded, shards)


def recomputation_chunk(slots: int) -> int:
    """Returns the largest power of two, at most a prefill chunk, that divides `slots`."""
    return min(slots & -slots, 1 << (PREFILL_CHUNK.bit_length() - 1))


def rectangle(name: str, rows: Any) -> Any:
    """Returns `rows` as a NumPy array.

    Raises:
        UserError: the rows have different lengths.
    """
    try:
        return np.asarray(rows)
    except ValueError:
        lengths = [len(row) for row in rows if hasattr(row, "__len__")]
        if len(set(lengths)) < 2:
            raise
        raise UserError(
            f"{name} has rows of {min(lengths)} to {max(lengths)} entries; pad them to one length, with 0 "
            "for padding in attention_mask, as tokenizer(texts) does, or run them one at a time"
        ) from None


def check_prompts(
    config: Phi3Config,
    input_ids: Any,
    attention_mask: Any,
    pad_token_id: int | None,
    end_tokens: Sequence[int],
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Returns token ids and mask as arrays [B, T].

    Without a mask, `pad_token_id` marks padding unless it is also an end token, as in the reference.

    Raises:
        UserError: the ids are not integers of two dimensions or outside the vocabulary, the mask has another
            shape, or a row has no token or fills the context.
    """
    ids = rectangle("input_ids", input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"input_ids is {ids.dtype}{list(ids.shape)}; expected integers of shape [batch, length]"
        )
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise UserError(f"input_ids has shape {list(ids.shape)}: there is nothing to continue")
    if attention_mask is None:
        has_padding = pad_token_id is not None and pad_token_id not in end_tokens
        mask = ids != pad_token_id if has_padding else np.ones(ids.shape, bool)
    else:
        mask = rectangle("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise UserError(
                f"attention_mask has shape {list(mask.shape)}; expected that of input_ids, {list(ids.shape)}"
            )
        mask = mask != 0
    outside = mask & ((ids < 0) | (ids >= config.vocab_size))
    if outside.any():
        row, position = np.argwhere(outside)[0]
        raise UserError(
            f"input_ids[{row}, {position}] = {ids[row, position]} is outside the vocabulary of "
            f"{config.vocab_size} tokens; is this the tokenizer of another model?"
        )
    _check_lengths(config, "input_ids", mask)
    return ids.astype(np.int32), mask


def _check_lengths(config: Phi3Config, name: str, mask: Bool[np.ndarray, "B T"]) -> None:
    tokens = mask.sum(axis=1)
    if not tokens.all():
        raise UserError(
            f"row {np.flatnonzero(tokens == 0)[0]} of {name} is all padding; give it at least one token"
        )
    context = config.context_length
    if tokens.max() >= context:
        raise UserError(
            f"row {tokens.argmax()} has {tokens.max()} tokens and the model's context is {context}; "
            "shorten the prompt"
        )


class EmbeddedPrompts(NamedTuple):
    """Prompts as embeddings, with the ids that generation returns and its logits processors see."""

    ids: Int[np.ndarray, "B I"]
    mask: Bool[np.ndarray, "B T"]
    rows: list[Int[np.ndarray, " n"]]
    """The ids of each row's embeddings; `vocab_size`, which is no token, where there is none."""
    vectors: list[Float[np.ndarray, "n D"]]
    """The embeddings of each row, without its padding."""


def check_embedded_prompts(
    config: Phi3Config, inputs_embeds: Any, input_ids: Any, attention_mask: Any
) -> EmbeddedPrompts:
    """Returns prompts that are given as embeddings [B, T, D].

    Ids [B, I], of no more positions, belong to the last embeddings. As in the reference, they are only
    returned and seen by logits processors.

    Raises:
        UserError: a shape does not fit, an id is outside the vocabulary, or a row is all padding or too long.
    """
    embeds = np.asarray(inputs_embeds)
    if embeds.ndim != 3 or embeds.shape[2] != config.hidden_size or not embeds.size:
        raise UserError(
            f"inputs_embeds has shape {list(embeds.shape)}; expected [batch, length, {config.hidden_size}]"
        )
    batch, length, _ = embeds.shape
    mask = np.ones((batch, length), bool)
    if attention_mask is not None:
        given = rectangle("attention_mask", attention_mask)
        if given.shape != mask.shape:
            raise UserError(
                f"attention_mask has shape {list(given.shape)}; expected that of inputs_embeds, "
                f"{list(mask.shape)}"
            )
        mask = given != 0
    _check_lengths(config, "inputs_embeds", mask)
    ids = np.zeros((batch, 0), np.int32)
    if input_ids is not None:
        ids, _ = check_prompts(config, input_ids, None, None, ())
        if len(ids) != batch or ids.shape[1] > length:
            raise UserError(
                f"input_ids has shape {list(ids.shape)}, and inputs_embeds has {batch} rows of {length} "
                "positions; give as many rows of ids and no more positions"
            )
    whole = np.full((batch, length), config.vocab_size, np.int32)
    whole[:, length - ids.shape[1] :] = ids
    rows = [row[used] for row, used in zip(whole, mask, strict=True)]
    return EmbeddedPrompts(ids, mask, rows, [row[used] for row, used in zip(embeds, mask, strict=True)])


def check_frequencies(
    config: Phi3Config, inv_freq: Any, scaling: Any, batch: int
) -> tuple[np.ndarray | LayerFrequencies | None, np.ndarray | None]:
    """Returns the user's rope frequencies and attention scaling for each of `batch` rows.

    Raises:
        UserError: a value is not finite; a shape does not fit `batch` rows or the sizes of the model; there
            is a scaling beside that of `LayerFrequencies`.
    """
    by_layer = isinstance(inv_freq, LayerFrequencies)
    if by_layer and scaling is not None:
        raise UserError("LayerFrequencies has its own attention_scaling; give no other")
    frequencies, factors = inv_freq if by_layer else (inv_freq, scaling)
    for name, values in {"inv_freq": frequencies, "attention_scaling": factors}.items():
        with np.errstate(over="ignore"):
            if values is not None and not np.isfinite(np.asarray(values, np.float32)).all():
                raise UserError(f"{name} has values that are not finite in float32")
    if by_layer:
        arrays = (np.asarray(each, np.float32) for each in inv_freq.with_all_axes(config, batch))
        whole = (np.broadcast_to(each, (batch, *each.shape[1:])) for each in arrays)
        return LayerFrequencies(*whole), None
    pairs = config.rotary_dim // 2
    if inv_freq is not None:
        inv_freq = np.asarray(inv_freq, np.float32)
        fits = inv_freq.ndim in (1, 2, 3) and inv_freq.shape[-1] == pairs
        if not fits or (inv_freq.ndim > 1 and inv_freq.shape[0] not in (1, batch)):
            raise UserError(
                f"inv_freq has shape {list(inv_freq.shape)}; expected [{pairs}], [{batch}, {pairs}] or, "
                f"by position, [{batch}, positions, {pairs}]"
            )
        inv_freq = np.atleast_2d(inv_freq)
        inv_freq = np.broadcast_to(inv_freq, (batch, *inv_freq.shape[1:]))
    if scaling is not None:
        scaling = np.asarray(scaling, np.float32)
        if scaling.shape not in ((), (1,), (batch,)):
            raise UserError(
                f"attention_scaling has shape {list(scaling.shape)}; expected a number or [{batch}]"
            )
        scaling = np.broadcast_to(scaling, (batch,))
    return inv_freq, scaling


class SlotEmbeddings(NamedTuple):
    """The embeddings that stand in the place of ids in the slots of prompts."""

    vectors: Float[np.ndarray | Array, "B S D"]
    is_given: Bool[np.ndarray | Array, "B S"]

    def take(self, rows: Int[np.ndarray, " n"]) -> "SlotEmbeddings":
        """Returns these rows in this order; a number past the last row means that one."""
        return SlotEmbeddings(*(np.take(x, rows, axis=0, mode="clip") for x in self))


class PromptLayout:
    """Assigns slots to the tokens of each row: padded on the left, or after those that a cache holds.

    Attributes:
        ids: int32 [B, slots]; mask: [B, slots], True where a slot holds a token.
        length: used slots [B]; cached: those of them that the cache already holds [B].
        slots: for each row, the slots of its tokens in order.
        pending: the largest number of slots of a row that the cache does not hold.
        aligned: whether all rows end at the same slot.
    """

    def __init__(self, rows: Sequence[Int[np.ndarray, " n"]], cache: KVCache | None = None):
        """`rows` are each row's tokens, none for a padding row; `cache` holds a prefix of the first rows."""
        count = len(rows)
        self.aligned = cache is None
        self.cached = np.zeros(count, np.int32)
        if cache is None:
            width = padded_length(max(map(len, rows)))
            self.slots = [np.arange(width - len(row), width) for row in rows]
        else:
            self.slots = [np.arange(len(row)) for row in rows]
            for row, cached_slots in enumerate(_cached_slots(cache)):
                # The last token is fed again because its logits are not cached.
                reused = min(len(cached_slots), len(rows[row]) - 1)
                whole = reused == len(cached_slots)
                used = int(np.asarray(cache.length)[row]) if whole else int(cached_slots[reused])
                self.cached[row] = used
                self.slots[row] = np.append(cached_slots[:reused], used + np.arange(len(rows[row]) - reused))
            width = max(int(slots[-1]) + 1 for slots in self.slots if len(slots))
        self.ids = np.zeros((count, width), np.int32)
        self.mask = np.zeros((count, width), bool)
        self.length = np.full(count, width, np.int32)
        for row, (tokens, slots) in enumerate(zip(rows, self.slots, strict=True)):
            self.ids[row, slots] = tokens
            self.mask[row, slots] = True
            self.length[row] = slots[-1] + 1 if len(slots) else width
        self.pending = self._most_pending()

    def _most_pending(self) -> int:
        has_tokens = self.mask.any(axis=1)
        return int((self.length - self.cached)[has_tokens].max())

    def embeddings(self, vectors: Sequence[Float[np.ndarray, "n D"]]) -> SlotEmbeddings:
        """Returns the slots of the first rows' embeddings, which come before their other tokens."""
        placed = np.zeros((*self.ids.shape, vectors[0].shape[1]), vectors[0].dtype)
        is_given = np.zeros(self.ids.shape, bool)
        for row, given in enumerate(vectors):
            slots = self.slots[row][: len(given)]
            placed[row, slots], is_given[row, slots] = given, True
        return SlotEmbeddings(placed, is_given)

    def uncached(self) -> "PromptLayout":
        """Returns the same slots, none of them cached."""
        layout = copy.copy(self)
        layout.cached = np.zeros_like(self.cached)
        layout.pending = layout._most_pending()
        return layout


def _cached_slots(cache: KVCache) -> list[Int[np.ndarray, " n"]]:
    """Returns the slots of the tokens that each row of a cache holds, in order."""
    length, tokens, mask = (np.asarray(x) for x in (cache.length, cache.tokens, cache.mask))
    if mask.shape[1] >= length.max() and (mask.sum(axis=1) == tokens).all():
        return [np.flatnonzero(row[:used]) for row, used in zip(mask, length, strict=True)]
    return [np.arange(used - count, used) for used, count in zip(length, tokens, strict=True)]
