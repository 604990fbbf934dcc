"""Places beside the slots, where prompts are computed before they are put into slots."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.prefixes import KEPT
from phi3_jax.cache import KVCache
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.forward import fill
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, State
from phi3_jax.model import Phi3ForCausalLM

NEVER = np.iinfo(np.int32).max

Block = tuple[list[Any], list[Any]]
"""Some columns of a row's keys and values, layer by layer: [1, K, columns, H] each."""


class Row(NamedTuple):
    """A prompt, and what it has made so far."""

    ids: list[int]
    """Prompt and answer."""
    new: int
    """Tokens of the answer."""
    most: int
    """That the answer may have."""
    options: RowOptions = RowOptions()
    shared: int = 0
    """Its first tokens that other prompts have too."""


class Stage:
    """Lanes of fixed size, used again and again: what lies behind a row's tokens is never read.

    Args:
        compiled: the model.
        lanes: rows that are computed together, at least; a mesh may ask for more.
        columns: places for tokens, of the caches.
        most: tokens of the longest row.
    """

    def __init__(self, compiled: CompiledModel, lanes: int, columns: int, most: int):
        self.lanes = compiled.rows_for(lanes)
        self._compiled, self._most = compiled, most
        self.state = State(
            sequences_of([], self.lanes, most),
            jnp.zeros(self.lanes, bool),
            compiled.model.init_cache(self.lanes, columns),
        )

    def begin(self, rows: Sequence[Row], beginnings: Sequence[Sequence[Block]]) -> None:
        """Takes new rows, of which only what they share is computed: as many blocks of it as there are.

        Lanes that are left have no tokens.
        """
        cache = self.state.cache
        # Arrays of their own: all are given away to the next program.
        length, tokens, rope_length = (jnp.zeros(self.lanes, jnp.int32) for _ in range(3))
        mask = jnp.zeros(cache.mask.shape, bool)
        cache = replace(cache, length=length, tokens=tokens, rope_length=rope_length, mask=mask)
        sequences = sequences_of([(row.ids, row.new) for row in rows], self.lanes, self._most)
        self.state = replace(self.state, sequences=sequences, cache=cache)
        for lane, (row, blocks) in enumerate(zip(rows, beginnings, strict=True)):
            for number, block in enumerate(blocks):
                at = np.array([lane, number, row.shared, len(row.ids)], np.int32)
                self.state = self._compiled(_put_block, self.state, block, jnp.asarray(at))

    def fill(self, width: int, rope: RopeChoice | None = None) -> None:
        """Computes the next tokens of each row, at most `width` and never the last, which makes the next."""
        rope = no_choice(self.lanes) if rope is None else rope
        self.state, _ = self._compiled(fill, self.state, rope, width=width, outputs=frozenset())

    def block(self, number: int, size: int) -> Block:
        """A copy of the first row's columns [number * size, (number + 1) * size)."""
        self.state, block = self._compiled(_take_block, self.state, jnp.int32(number), size=size)
        return block


class Beginnings:
    """The keys and values of what prompts share, computed when they are first asked for.

    Args:
        stage: where they are computed.
        config: the model's.
        widths: tokens that are computed at a time.
        kept: as many; those longest unused go.
    """

    def __init__(self, compiled: CompiledModel, stage: Stage, *, widths: Sequence[int], kept: int = KEPT):
        self._config, self._stage, self._kept = compiled.model.config, stage, kept
        self._widths = sorted(widths)
        self._made: OrderedDict[tuple[bytes, tuple[int, ...]], list[Block]] = OrderedDict()
        self.computed = 0
        """Tokens, so far."""

    def of(self, row: Row) -> list[Block]:
        """What a row shares, under the frequencies that its length asks for, in blocks of the least width."""
        if not row.shared:
            return []
        base = self._config.rope_base
        frequencies = self._config.rope_scaling.frequencies(base, jnp.asarray([len(row.ids)]))
        key = b"".join(np.asarray(each).tobytes() for each in frequencies), tuple(row.ids[: row.shared])
        if key not in self._made:
            self._made[key] = self._computed(row)
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def _computed(self, row: Row) -> list[Block]:
        # One token more, which would make the next and is not computed.
        self._stage.begin([Row([*row.ids[: row.shared], 0], 0, 1)], [[]])
        rope = RopeChoice(jnp.full(self._stage.lanes, len(row.ids), jnp.int32), jnp.int32(NEVER))
        left = row.shared
        while left > 0:
            width = fitting(left, self._widths)
            self._stage.fill(width, rope)
            left -= width
        self.computed += row.shared
        size = self._widths[0]
        return [self._stage.block(number, size) for number in range(-(-row.shared // size))]


def fitting(tokens: int, widths: Sequence[int]) -> int:
    """The least of the sorted widths that has room for so many tokens, or the largest."""
    return next((width for width in widths if width >= tokens), widths[-1])


def sequences_of(rows: Sequence[tuple[Sequence[int], int]], lanes: int, most: int) -> Sequences:
    """Sequences of these ids, of which the last so many are new; lanes beyond the rows are empty."""
    ids = np.zeros((lanes, most), np.int32)
    length, new = np.zeros(lanes, np.int32), np.zeros(lanes, np.int32)
    for lane, (tokens, own) in enumerate(rows):
        ids[lane, : len(tokens)] = tokens
        length[lane], new[lane] = len(tokens), own
    return Sequences(
        ids=jnp.asarray(ids),
        mask=jnp.asarray(np.arange(most) < length[:, None]),
        length=jnp.asarray(length),
        new=jnp.asarray(new),
    )


def no_choice(lanes: int) -> RopeChoice:
    """Each row's own length chooses its rope list."""
    return RopeChoice(jnp.zeros(lanes, jnp.int32), jnp.int32(NEVER))


def _put_block(model: Phi3ForCausalLM, state: State, block: Block, at: Int[Array, "4"]) -> State:
    """`state` with a block of a beginning; `at`: lane, number of the block, tokens shared and of the row."""
    lane, number, shared, length = at
    cache = state.cache

    def put(whole: Float[Array, "B K S H"], new: Float[Array, "1 K s H"]) -> Array:
        return jax.lax.dynamic_update_slice(whole, new, (lane, 0, number * new.shape[2], 0))

    keys, values = (
        [jax.tree.map(put, old, new) for old, new in zip(olds, news, strict=True)]
        for olds, news in zip((cache.keys, cache.values), block, strict=True)
    )
    return replace(
        state,
        cache=replace(
            cache,
            keys=keys,
            values=values,
            mask=cache.mask.at[lane].set(jnp.arange(cache.mask.shape[1]) < shared),
            length=cache.length.at[lane].set(shared),
            tokens=cache.tokens.at[lane].set(shared),
            rope_length=cache.rope_length.at[lane].set(length),
        ),
    )


def _take_block(
    model: Phi3ForCausalLM, state: State, number: Int[Array, ""], *, size: int
) -> tuple[State, Block]:
    def take(whole: Float[Array, "B K S H"]) -> Float[Array, "1 K size H"]:
        return jax.lax.dynamic_slice_in_dim(whole[:1], number * size, size, axis=2)

    cache: KVCache = state.cache
    return state, (jax.tree.map(take, cache.keys), jax.tree.map(take, cache.values))
