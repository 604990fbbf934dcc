"""The arguments of a forward: checked, in one form, and located among the cache's slots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.generation.prompts import rectangle
from phi3_jax.model.block_sparse import SparseBlocks
from phi3_jax.model.losses import IGNORE_INDEX, problem_type
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.symbolic import is_certain


@dataclass(frozen=True)
class NewTokens:
    """The checked arguments of a forward."""

    input_ids: Int[Array, "B T"] | None
    inputs_embeds: Float[Array, "B T D"] | None
    mask: Bool[Array, "B _"] | None
    """True for tokens, over the new positions or over the cached and the new ones."""
    mask_4d: Array | None
    position_ids: Int[Array, "B T"] | None
    segment_ids: Int[Array, "B T"] | None
    batch_size: int
    length: int

    def refuse_segments(self) -> None:
        """Raises a UserError if there are segments, which go without a cache."""
        if self.segment_ids is not None:
            raise UserError(
                "segment_ids go without a cache, whose slots are one example's: leave out past_key_values "
                "and use_cache, and give each example a row of its own to continue it"
            )


@dataclass(frozen=True)
class Location:
    """The positions of new tokens in their rows, and the keys that they may see."""

    mask: CausalMask | Array
    position_ids: Int[Array, "B T"]
    rope_length: Int[Array, " B"]
    """The length by which each row's rope frequencies are chosen."""
    key_mask: Bool[Array, "B S"]
    """True for keys that are tokens, the new ones included."""
    tokens: Int[Array, " B"]
    """Tokens of each row so far, counted along the mask."""

    @property
    def prefill(self) -> bool:
        """Whether the new tokens see only each other, by the causal mask."""
        return isinstance(self.mask, CausalMask) and self.mask.prefill


_segments = "give segment_ids for several texts in a row"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "return_dict": ((None, True), "take the fields of the output"),
    "output_router_logits": ((None, False), "the model has no experts"),
    "is_causal": ((None, True), "give a 4-D attention_mask to change who sees whom"),
    "cache_position": ((None,), "the cache knows its next slot"),
    "token_type_ids": ((None,), "the model has no types of tokens"),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), ((None,), _segments)),
    "seq_idx": ((None,), _segments),
}
"""Arguments of transformers' forward that ours does not take: values without effect, and what to do."""


def refuse(others: Mapping[str, Any]) -> None:
    """Raises an error for arguments that the forward does not take, unless they ask for nothing.

    Raises:
        UserError: an argument of transformers is not supported. TypeError: there is no such argument.
    """
    for name, value in others.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"the model has no argument {name!r}; see Phi3Model.__call__ for all")
        neutral, advice = UNSUPPORTED[name]
        if not any(value is each for each in neutral):
            raise UserError(f"{name}={value!r:.60} is not supported; {advice}")


def is_concrete(x: Any) -> bool:
    """Whether `x` has values that can be read, which under `jit` it has not."""
    return x is not None and not isinstance(x, jax.core.Tracer)


def check(
    config: Phi3Config,
    cache: KVCache | None,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    segment_ids: Any = None,
) -> NewTokens:
    """Returns the arguments in one form; values are checked only where they are concrete.

    Raises:
        UserError: an argument has the wrong shape or dtype, or contradicts another one.
    """
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
        _check_integers("position_ids", position_ids, (batch, length), ((batch, length), (1, length)))
        position_ids = jnp.broadcast_to(position_ids.astype(jnp.int32), (batch, length))
    if cache is not None:
        _check_cache(config, cache, batch, length)
    mask, mask_4d = _check_mask(config, attention_mask, batch, length, cache)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        _check_integers("segment_ids", segment_ids, (batch, length))
        if mask_4d is not None:
            raise UserError("segment_ids and a 4-D attention_mask both say who sees whom; give one of them")
        segment_ids = segment_ids.astype(jnp.int32)
    new = NewTokens(input_ids, inputs_embeds, mask, mask_4d, position_ids, segment_ids, batch, length)
    if cache is not None:
        new.refuse_segments()
    return new


def _check_integers(
    name: str, x: Array, expected: tuple[int, ...], shapes: tuple[tuple[int, ...], ...] = ()
) -> None:
    if x.shape not in (shapes or (expected,)) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise UserError(f"{name} is {x.dtype}{list(x.shape)}; expected integers of shape {list(expected)}")


def _check_ids(config: Phi3Config, input_ids: Any) -> Array:
    if not isinstance(input_ids, jax.Array):
        input_ids = rectangle("input_ids", input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise UserError(
            f"input_ids is {input_ids.dtype}{list(input_ids.shape)}; "
            "expected integers of shape [batch, length]"
        )
    if is_concrete(input_ids) and input_ids.size:
        values = np.asarray(input_ids)
        outside = (values < 0) | (values >= config.vocab_size)
        if outside.any():
            row, position = np.argwhere(outside)[0]
            raise UserError(
                f"input_ids[{row}, {position}] = {values[row, position]} is outside the vocabulary of "
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
    used = cache.get_seq_length() if is_concrete(cache.length) else 0
    if is_certain(lambda: used + length > cache.max_length):
        raise UserError(
            f"the cache has {cache.max_length} slots a row: {used} are used and {length} more tokens do not "
            f"fit; make it with init_cache(batch_size, {used + length}) or enlarge it with "
            f"resize({used + length})"
        )


def _check_mask(
    config: Phi3Config, attention_mask: Any, batch: int, length: int, cache: KVCache | None
) -> tuple[Array | None, Array | None]:
    """Returns the mask of tokens and the 4-D mask, one of which is None."""
    if attention_mask is None:
        return None, None
    if isinstance(attention_mask, list | tuple):
        attention_mask = rectangle("attention_mask", attention_mask)
    mask = jnp.asarray(attention_mask)
    keys = length if cache is None else cache.max_length
    if cache is not None and cache.window is not None and mask.shape != (batch, length):
        raise UserError(
            f"attention_mask has shape {mask.shape}; a cache that is a ring takes a mask of the new "
            f"tokens only, {(batch, length)}"
        )
    if mask.ndim == 4:
        if config.block_pattern is not None:
            raise UserError(
                "block-sparse layers count blocks by the tokens of a 2-D mask; give that instead of a 4-D "
                "attention_mask, or segment_ids for several texts in a row"
            )
        heads = (1, config.num_attention_heads)
        if mask.shape[0] not in (1, batch) or mask.shape[1] not in heads or mask.shape[2:] != (length, keys):
            raise UserError(
                f"the 4-D attention_mask has shape {mask.shape}; expected "
                f"({batch}, 1 or {config.num_attention_heads}, {length}, {keys})"
                + ("" if cache is None else ", the last being the cache's slots")
            )
        mask = mask if jnp.issubdtype(mask.dtype, jnp.floating) else mask.astype(bool)
        return None, jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
    fits = mask.ndim == 2 and mask.shape[0] == batch
    if not fits or is_certain(lambda: mask.shape[1] < length) or is_certain(lambda: mask.shape[1] > keys):
        past = "" if cache is None else ", or with the cached tokens before them"
        raise UserError(f"attention_mask has shape {mask.shape}; expected {(batch, length)}{past}")
    if mask.shape[1] > length and cache is not None and is_concrete(cache.length):
        used = cache.get_seq_length()
        if mask.shape[1] not in (used + length, cache.max_length):
            raise UserError(
                f"attention_mask covers {mask.shape[1]} tokens; expected the {length} new ones, those and "
                f"the {used} cached ones, or all {cache.max_length} slots"
            )
    return mask.astype(bool), None


def locate(new: NewTokens, cache: KVCache | None, config: Phi3Config, rope_length: Any = None) -> Location:
    """Returns the mask, the positions and the rope lengths of the new tokens.

    Raises:
        UserError: `rope_length` has the wrong shape.
    """
    batch, length = new.batch_size, new.length
    is_token = jnp.ones((batch, length), bool) if new.mask is None else new.mask
    if new.segment_ids is not None:
        is_token &= new.segment_ids != 0
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    if cache is None:
        start = past = jnp.zeros((batch,), jnp.int32)
        key_slots, key_mask = offsets, is_token
    else:
        start, past = cache.length, cache.tokens
        key_slots = cache.slots(start + length)
        if is_token.shape[1] > length:  # the mask covers the cached tokens too
            key_mask = jnp.pad(is_token, ((0, 0), (0, cache.max_length - is_token.shape[1])))
            past = jnp.sum(key_mask & (key_slots < start[:, None]), axis=1, dtype=jnp.int32)
            is_token = jnp.take_along_axis(key_mask, start[:, None] + offsets, axis=1)
        else:
            index = key_slots - start[:, None]  # [B, S], of the new token in each slot
            new_mask = jnp.take_along_axis(is_token, jnp.clip(index, 0, length - 1), axis=1)
            key_mask = jnp.where((index >= 0) & (index < length), new_mask, cache.mask)
    counts = past[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
    position_ids = _positions(new, counts, is_token) if new.position_ids is None else new.position_ids
    mask: CausalMask | Array | None = new.mask_4d
    if mask is None:
        segments = None if new.segment_ids is None else jnp.where(is_token, new.segment_ids, 0)
        slots = start[:, None] + offsets
        window, prefill = config.sliding_window, cache is None
        blocks = None
        if (pattern := config.block_pattern) is not None:
            in_cache = jnp.cumsum(key_mask, axis=1, dtype=jnp.int32) - 1
            positions = _positions(new, counts, is_token)
            shifts = jnp.asarray(pattern.shifts).reshape(config.num_key_value_heads, -1)
            blocks = SparseBlocks(positions, positions if cache is None else in_cache, shifts, pattern)
        mask = CausalMask(slots, key_slots, key_mask, window, prefill, segments, segments, blocks)
    if rope_length is None:
        rope_length = jnp.max(jnp.where(is_token, position_ids + 1, 0), axis=1)
        rope_length = rope_length if cache is None else jnp.maximum(rope_length, cache.rope_length)
    rope_length = jnp.asarray(rope_length, jnp.int32)
    if rope_length.shape not in ((), (1,), (batch,)):
        raise UserError(f"rope_length has shape {rope_length.shape}; expected a number or [{batch}]")
    return Location(
        mask=mask,
        position_ids=position_ids,
        rope_length=jnp.broadcast_to(rope_length, (batch,)),
        key_mask=key_mask,
        tokens=counts[:, -1],
    )


def _positions(new: NewTokens, counts: Int[Array, "B T"], is_token: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns positions counted along the mask; they restart at 0 in each segment."""
    position_ids = jnp.maximum(counts - 1, 0)
    if new.segment_ids is None:
        return position_ids
    starts = jnp.diff(new.segment_ids, axis=1, prepend=0) != 0
    in_others = jax.lax.cummax(jnp.where(starts, counts - is_token.astype(jnp.int32), 0), axis=1)
    return jnp.maximum(position_ids - in_others, 0)


def batch_shape(input_ids: Any, decoder_arguments: dict[str, Any]) -> tuple[int, int]:
    """Returns the batch size and the length of a forward's arguments."""
    x: Any = decoder_arguments.get("inputs_embeds") if input_ids is None else input_ids
    shape = np.shape(rectangle("input_ids", x) if isinstance(x, list | tuple) else x)
    if len(shape) < 2:
        raise UserError(f"input_ids has shape {list(shape)}; expected [batch, length]")
    return shape[0], shape[1]


def select_positions(x: Float[Array, "B T D"], positions: Any) -> Float[Array, "B kept D"]:
    """Returns `x` at the positions of a `logits_to_keep` that is an array, [kept] or [B, kept].

    Raises:
        UserError: `positions` has the wrong shape or dtype, or names a position that does not exist.
    """
    positions = positions if isinstance(positions, jax.Array) else np.asarray(positions)
    batch, length, _ = x.shape
    fits = positions.ndim <= 2 and positions.shape[:-1] in ((), (batch,))
    if not fits or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise UserError(
            f"logits_to_keep is {positions.dtype}{list(positions.shape)}; "
            f"expected a number, or integers of shape [kept] or [{batch}, kept]"
        )
    if is_concrete(positions):
        values = np.asarray(positions)
        outside = values[(values < -length) | (values >= length)]
        if outside.size:
            raise UserError(f"logits_to_keep names position {outside[0]} of {length} tokens")
    positions = jnp.asarray(positions, jnp.int32)
    return (
        x[:, positions] if positions.ndim == 1 else x[jnp.arange(batch, dtype=jnp.int32)[:, None], positions]
    )


def check_labels(labels: Any, shape: tuple[int, ...], classes: int) -> Array:
    """Returns integer labels of this shape, each a class or -100.

    Raises:
        UserError: the labels have another shape or dtype, or one is no class.
    """
    labels = labels if isinstance(labels, jax.Array) else rectangle("labels", labels)
    _check_integers("labels", labels, shape)
    if is_concrete(labels):
        values = np.asarray(labels)
        wrong = ((values < 0) | (values >= classes)) & (values != IGNORE_INDEX)
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise UserError(
                f"labels[{', '.join(map(str, where))}] = {values[where]}; expected 0 to {classes - 1}, "
                f"or {IGNORE_INDEX} for what does not count"
            )
    return jnp.asarray(labels, jnp.int32)


def check_sequence_labels(labels: Any, config: Phi3Config, batch: int) -> Array:
    """Returns the labels of rows in the form that the problem type needs.

    Raises:
        UserError: they do not fit the problem type and the number of labels.
    """
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    problem, classes = problem_type(config, labels), config.num_labels
    if problem == "single_label_classification":
        return check_labels(labels.reshape(-1) if labels.size == batch else labels, (batch,), classes)
    fits = labels.size == batch if classes == 1 else labels.shape == (batch, classes)
    if not fits:
        raise UserError(
            f"labels has shape {list(labels.shape)}; {problem} with num_labels={classes} "
            f"needs {list((batch, classes) if classes > 1 else (batch,))}"
        )
    return jnp.asarray(labels)
