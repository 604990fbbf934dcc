"""Prefills prompts in buffers outside the slots, and keeps the keys and values of shared prefixes."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.prefixes import CAPACITY
from phi3_jax.cache import KVCache
from phi3_jax.cache.layer_cache import write_row
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.forward import fill
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, State
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.sizes import INT32_MAX, ceil_div

Block = tuple[list[Any], list[Any]]
"""The keys and values of a block of positions of one row, layer by layer: [1, K, size, H] each."""


class BatchRow(NamedTuple):
    """A prompt with the tokens generated so far."""

    ids: list[int]
    """The tokens of the prompt and the answer."""
    new_tokens: int
    """The tokens of the answer."""
    max_new_tokens: int
    options: RowOptions = RowOptions()
    prefix_length: int = 0
    """The tokens of the shared prefix."""


class PrefillBuffer:
    """Computes the keys and values of prompts, a fixed number of rows at a time.

    The buffer is used again and again; positions after a row's tokens hold old values and are never read.

    Args:
        compiled: the model.
        rows: the rows that are computed together; a mesh may need more.
        cache_length: the positions of its cache.
        max_length: the tokens of the longest row.
    """

    def __init__(self, compiled: CompiledModel, rows: int, cache_length: int, max_length: int):
        self.rows = compiled.rows_for(rows)
        self._compiled, self._max_length = compiled, max_length
        self.state = State(
            sequences_of([], self.rows, max_length),
            jnp.zeros(self.rows, bool),
            compiled.model.init_cache(self.rows, cache_length, compiled.model.cache_dtype),
        )

    def load(self, rows: Sequence[BatchRow], prefixes: Sequence[Sequence[Block]]) -> None:
        """Replaces the rows; the blocks of each row's shared prefix are copied to its cache.

        Rows of the buffer without a prompt have no tokens.
        """
        cache = self.state.cache
        # Separate arrays, for all are donated to the next program.
        length, tokens, rope_length = (jnp.zeros(self.rows, jnp.int32) for _ in range(3))
        mask = jnp.zeros(cache.mask.shape, bool)
        cache = replace(cache, length=length, tokens=tokens, rope_length=rope_length, mask=mask)
        sequences = sequences_of(rows, self.rows, self._max_length)
        self.state = replace(self.state, sequences=sequences, cache=cache)
        for index, (row, blocks) in enumerate(zip(rows, prefixes, strict=True)):
            for number, block in enumerate(blocks):
                at = np.array([index, number, row.prefix_length, len(row.ids)], np.int32)
                self.state = self._compiled(_write_block, self.state, block, jnp.asarray(at))

    def prefill(self, width: int, rope: RopeChoice | None = None) -> None:
        """Computes up to `width` further tokens of each row, but not the last, which decoding computes."""
        rope = own_rope(self.rows) if rope is None else rope
        self.state, _ = self._compiled(fill, self.state, rope, width=width, outputs=frozenset())

    def block(self, number: int, size: int) -> Block:
        """Returns a copy of the first row's positions [number * size, (number + 1) * size)."""
        self.state, block = self._compiled(_read_block, self.state, jnp.int32(number), size=size)
        return block


class PrefixCache:
    """The keys and values of shared prefixes, each computed when a prompt first needs it.

    Args:
        compiled: the model.
        buffer: computes the prefixes.
        widths: the numbers of tokens that can be computed at a time.
        capacity: the number of prefixes; the least recently used is dropped.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        buffer: PrefillBuffer,
        *,
        widths: Sequence[int],
        capacity: int = CAPACITY,
    ):
        self._config, self._buffer, self._capacity = compiled.model.config, buffer, capacity
        self._widths = sorted(widths)
        self._blocks: OrderedDict[tuple[bytes, tuple[int, ...]], list[Block]] = OrderedDict()
        self.computed_tokens = 0

    def blocks(self, row: BatchRow) -> list[Block]:
        """Returns the blocks of a row's shared prefix, each with as many positions as the least width.

        They are computed with the rope frequencies of the row's length.
        """
        if not row.prefix_length:
            return []
        base = self._config.rope_base
        frequencies = self._config.rope_scaling.frequencies(base, jnp.asarray([len(row.ids)], jnp.int32))
        key = (
            b"".join(np.asarray(each).tobytes() for each in frequencies),
            tuple(row.ids[: row.prefix_length]),
        )
        if key not in self._blocks:
            self._blocks[key] = self._compute(row)
            while len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _compute(self, row: BatchRow) -> list[Block]:
        # The token after the prefix stands for the last one, which is not computed.
        self._buffer.load([BatchRow([*row.ids[: row.prefix_length], 0], 0, 1)], [[]])
        rope = RopeChoice(jnp.full(self._buffer.rows, len(row.ids), jnp.int32), jnp.int32(INT32_MAX))
        remaining = row.prefix_length
        while remaining > 0:
            width = smallest_width(remaining, self._widths)
            self._buffer.prefill(width, rope)
            remaining -= width
        self.computed_tokens += row.prefix_length
        size = self._widths[0]
        return [self._buffer.block(number, size) for number in range(ceil_div(row.prefix_length, size))]


def smallest_width(tokens: int, widths: Sequence[int]) -> int:
    """Returns the smallest of the sorted widths that holds `tokens` tokens, or the largest."""
    return next((width for width in widths if width >= tokens), widths[-1])


def sequences_of(rows: Sequence[BatchRow], count: int, max_length: int) -> Sequences:
    """Returns the sequences of `rows`, with empty rows added up to `count`."""
    ids = np.zeros((count, max_length), np.int32)
    length, new = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        length[index], new[index] = len(row.ids), row.new_tokens
    return Sequences(
        ids=jnp.asarray(ids),
        mask=jnp.asarray(np.arange(max_length) < length[:, None]),
        length=jnp.asarray(length),
        new=jnp.asarray(new),
    )


def own_rope(rows: int) -> RopeChoice:
    """Returns the choice of rope frequencies by each row's own length."""
    return RopeChoice(jnp.zeros(rows, jnp.int32), jnp.int32(INT32_MAX))


def _write_block(model: Phi3ForCausalLM, state: State, block: Block, at: Int[Array, "4"]) -> State:
    """Writes a block of a prefix; `at`: row, number of the block, tokens of the prefix, tokens of the row."""
    row, number, prefix_length, length = at
    cache = state.cache

    def write(whole: Float[Array, "B K S H"], new: Float[Array, "1 K size H"]) -> Array:
        start, zero = number * new.shape[2], jnp.int32(0)
        if model.decoder.mesh is None:
            return write_row(whole, new, row, start)
        return jax.lax.dynamic_update_slice(whole, new, (row, zero, start, zero))

    keys, values = (
        [jax.tree.map(write, old, new) for old, new in zip(olds, news, strict=True)]
        for olds, news in zip((cache.keys, cache.values), block, strict=True)
    )
    return replace(
        state,
        cache=replace(
            cache,
            keys=keys,
            values=values,
            mask=cache.mask.at[row].set(jnp.arange(cache.mask.shape[1], dtype=jnp.int32) < prefix_length),
            length=cache.length.at[row].set(prefix_length),
            tokens=cache.tokens.at[row].set(prefix_length),
            rope_length=cache.rope_length.at[row].set(length),
        ),
    )


def _read_block(
    model: Phi3ForCausalLM, state: State, number: Int[Array, ""], *, size: int
) -> tuple[State, Block]:
    def read(whole: Float[Array, "B K S H"]) -> Float[Array, "1 K size H"]:
        return jax.lax.dynamic_slice_in_dim(whole[:1], number * size, size, axis=2)

    cache: KVCache = state.cache
    return state, (jax.tree.map(read, cache.keys), jax.tree.map(read, cache.values))
