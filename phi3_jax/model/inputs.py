"""What the caller hands a forward: checked, brought to one form, and located among the cache's slots."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError


@dataclass(frozen=True)
class NewTokens:
    """Checked arguments of a forward."""

    input_ids: Int[Array, "B T"] | None
    inputs_embeds: Float[Array, "B T D"] | None
    mask: Bool[Array, "B _"] | None
    """Over the new tokens or over the cached and the new ones."""
    mask_4d: Array | None
    position_ids: Int[Array, "B T"] | None
    segment_ids: Int[Array, "B T"] | None
    batch_size: int
    length: int


@dataclass(frozen=True)
class Location:
    """Where new tokens stand in their rows."""

    slots: Int[Array, "B T"]
    key_slots: Int[Array, "#B S"]
    key_mask: Bool[Array, "B S"]
    """Keys that are tokens, the new ones included."""
    position_ids: Int[Array, "B T"]
    tokens: Int[Array, " B"]
    """Tokens of each row so far, by position: the greatest position of a token plus one."""
    counted: Int[Array, " B"]
    """Tokens of each row so far, counted along the mask."""
    segments: Int[Array, "B T"] | None
    """The example that each token belongs to; 0: padding."""


def roomy(length: int) -> int:
    """Slots for a cache that nobody sized: at least 128 more than `length`, in steps of 128."""
    return -(-(length + 128) // 128) * 128


def known(x: Any) -> bool:
    """Whether the values of `x` can be looked at, as they cannot under `jit`."""
    return x is not None and not isinstance(x, jax.core.Tracer)


def check(
    config: Phi3Config,
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    position_ids: Any,
    cache: KVCache | None,
    segment_ids: Any,
) -> NewTokens:
    """Brings the arguments to one form or says which of them is wrong; values only where they are known."""
    if (input_ids is None) == (inputs_embeds is None):
        raise UserError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is not None:
        inputs_embeds = jnp.asarray(inputs_embeds)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise UserError(
                f"inputs_embeds has shape {inputs_embeds.shape}; "
                f"expected [batch, length, {config.hidden_size}]"
            )
        batch, length = inputs_embeds.shape[:2]
    else:
        input_ids = _check_ids(config, input_ids)
        batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise UserError(f"nothing to compute: the batch has {batch} rows of {length} tokens")
    if position_ids is not None:
        position_ids = jnp.asarray(position_ids)
        integers = jnp.issubdtype(position_ids.dtype, jnp.integer)
        if position_ids.shape not in ((batch, length), (1, length)) or not integers:
            raise UserError(
                f"position_ids is {position_ids.dtype}{list(position_ids.shape)}; "
                f"expected integers of shape {[batch, length]}"
            )
        position_ids = jnp.broadcast_to(position_ids.astype(jnp.int32), (batch, length))
    if cache is not None:
        _check_cache(config, cache, batch, length)
    mask, mask_4d = _check_mask(config, attention_mask, batch, length, cache)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise UserError(
                f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}; "
                f"expected integers of shape {[batch, length]}"
            )
        if mask_4d is not None:
            raise UserError(
                "segment_ids say who sees whom, and so does a 4-D attention_mask; give one of them"
            )
        segment_ids = segment_ids.astype(jnp.int32)
    return NewTokens(input_ids, inputs_embeds, mask, mask_4d, position_ids, segment_ids, batch, length)


def _check_ids(config: Phi3Config, input_ids: Any) -> Array:
    if not isinstance(input_ids, jax.Array):
        input_ids = np.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise UserError(
            f"input_ids is {input_ids.dtype}{list(input_ids.shape)}; "
            "expected integers of shape [batch, length]"
        )
    if known(input_ids) and input_ids.size:
        values = np.asarray(input_ids)
        outside = (values < 0) | (values >= config.vocab_size)
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise UserError(
                f"input_ids[{row}, {column}] = {values[row, column]} is outside the vocabulary of "
                f"{config.vocab_size} tokens; is this the tokenizer of another model?"
            )
    return jnp.asarray(input_ids, jnp.int32)


def _check_cache(config: Phi3Config, cache: KVCache, batch: int, length: int) -> None:
    expected = (batch, config.num_key_value_heads, cache.max_length, config.head_dim)
    if len(cache.keys) != config.num_hidden_layers or cache.keys[0].shape != expected:
        raise UserError(
            f"past_key_values has {len(cache.keys)} layers of shape {cache.keys[0].shape}; this model and "
            f"batch need {config.num_hidden_layers} of shape {expected}"
        )
    if cache.window is not None:
        if config.sliding_window is None or config.sliding_window > cache.window:
            raise UserError(
                f"past_key_values keeps a window of {cache.window} slots, the model's "
                f"sliding_window is {config.sliding_window}"
            )
        if cache.window - 1 + length > cache.max_length:
            raise UserError(
                f"the cache is a ring of {cache.max_length} slots a row: {cache.window - 1} belong to the "
                f"window of {cache.window} and {length} new tokens do not fit beside them; feed at most "
                f"{cache.max_length - cache.window + 1} at once, or make it with a larger chunk"
            )
        return
    used = cache.get_seq_length() if known(cache.length) else 0
    if used + length > cache.max_length:
        raise UserError(
            f"the cache has {cache.max_length} slots a row: {used} are used and {length} more tokens do not "
            f"fit; make it with init_cache(batch_size, {used + length}) or enlarge it with "
            f"resize({used + length})"
        )


def _check_mask(
    config: Phi3Config, attention_mask: Any, batch: int, length: int, cache: KVCache | None
) -> tuple[Array | None, Array | None]:
    if attention_mask is None:
        return None, None
    mask = jnp.asarray(attention_mask)
    keys = length if cache is None else cache.max_length
    if cache is not None and cache.window is not None and mask.shape != (batch, length):
        raise UserError(
            f"attention_mask has shape {mask.shape}; a cache that is a ring takes a mask of the new "
            f"tokens only, {(batch, length)}"
        )
    if mask.ndim == 4:
        heads = (1, config.num_attention_heads)
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in heads or mask.shape[2:] != (length, keys):
            raise UserError(
                f"the 4-D attention_mask has shape {mask.shape}; expected "
                f"({batch}, 1 or {config.num_attention_heads}, {length}, {keys})"
                + ("" if cache is None else ", the last being the cache's slots")
            )
        mask = mask if jnp.issubdtype(mask.dtype, jnp.floating) else mask.astype(bool)
        return None, jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
    if mask.ndim != 2 or mask.shape[0] != batch or not length <= mask.shape[1] <= keys:
        past = "" if cache is None else ", or with the cached tokens in front"
        raise UserError(f"attention_mask has shape {mask.shape}; expected {(batch, length)}{past}")
    if mask.shape[1] > length and cache is not None and known(cache.length):
        used = cache.get_seq_length()
        if mask.shape[1] not in (used + length, cache.max_length):
            raise UserError(
                f"attention_mask covers {mask.shape[1]} tokens; expected the {length} new ones, those and "
                f"the {used} cached ones, or all {cache.max_length} slots"
            )
    return mask.astype(bool), None


def locate(new: NewTokens, cache: KVCache | None) -> Location:
    """Slots, visible keys and positions of the new tokens."""
    batch, length = new.batch_size, new.length
    is_token = jnp.ones((batch, length), bool) if new.mask is None else new.mask
    if new.segment_ids is not None:
        is_token &= new.segment_ids != 0
    offsets = jnp.arange(length, dtype=jnp.int32)
    if cache is None:
        start = past = jnp.zeros((batch,), jnp.int32)
        key_slots, key_mask = offsets[None], is_token
    else:
        start, past = cache.length, cache.tokens
        key_slots = cache.slots(start + length)
        if is_token.shape[1] > length:  # the cached tokens in front
            key_mask = jnp.pad(is_token, ((0, 0), (0, cache.max_length - is_token.shape[1])))
            past = jnp.sum(key_mask & (key_slots < start[:, None]), axis=1, dtype=jnp.int32)
            is_token = jnp.take_along_axis(key_mask, start[:, None] + offsets, axis=1)
        else:
            index = key_slots - start[:, None]  # [B, S], of the new token at each place
            brought = jnp.take_along_axis(is_token, jnp.clip(index, 0, length - 1), axis=1)
            key_mask = jnp.where((index >= 0) & (index < length), brought, cache.mask)
    counted = past[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
    position_ids, segments = new.position_ids, None
    if position_ids is None:
        position_ids = jnp.maximum(counted - 1, 0)
        if new.segment_ids is not None:
            begins = jnp.diff(new.segment_ids, axis=1, prepend=0) != 0
            before = jax.lax.cummax(jnp.where(begins, counted - is_token, 0), axis=1)  # in other segments
            position_ids = jnp.maximum(position_ids - before, 0)
    if new.segment_ids is not None:
        segments = jnp.where(is_token, new.segment_ids, 0)
    return Location(
        slots=start[:, None] + offsets,
        key_slots=key_slots,
        key_mask=key_mask,
        position_ids=position_ids,
        tokens=jnp.max(jnp.where(is_token, position_ids + 1, 0), axis=1),
        counted=counted[:, -1],
        segments=segments,
    )
