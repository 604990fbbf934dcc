"""Slots on the device: prompts are computed beside them, put into them, and make tokens together."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.batch.options import RowOptions, keys, processors
from phi3_jax.batch.prefixes import KEPT
from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.forward import fill
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, Settings, State
from phi3_jax.model import KVCache, Phi3ForCausalLM
from phi3_jax.model.ragged import RaggedVectors
from phi3_jax.sharding import shards

STEPS = 8
"""Tokens a slot in one dispatch, at most: those behind an answer's end are computed in vain."""

NEVER = np.iinfo(np.int32).max

SMALLEST = 128
"""Columns beside the slots come in powers of two, from this on."""


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


class Decoded(NamedTuple):
    """What a dispatch has made, on the host."""

    tokens: Int[np.ndarray, "steps slots"]
    """-1 where there is none."""
    finished: Bool[np.ndarray, " slots"]
    stale: Bool[np.ndarray, " slots"]
    """Slots that must be computed again under longrope's other list before they go on."""


class Slots:
    """The slots of all pools, each with its pool's number of places for tokens; all make tokens together.

    All shapes are fixed: whatever prompts come, the same few programs run. A slot is named by its pool and
    its number there.

    Args:
        compiled: the model.
        pools: a row has at most as many tokens as its slot has columns, but one.
        groups: (prompts, tokens of each) that are computed together.
        widths: tokens of a single prompt that are computed at a time.
        end_tokens: any of which ends an answer.
        beginnings: that rows of all pools share.

    Raises:
        ValueError: slots that the mesh does not divide.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        pools: Sequence[PoolSize],
        *,
        groups: Sequence[tuple[int, int]],
        widths: Sequence[int],
        end_tokens: Sequence[int],
        beginnings: "Beginnings",
    ):
        self._compiled, self._widths = compiled, sorted(widths)
        self._groups = {width: lanes_for(compiled, rows) for rows, width in groups}
        self._pools = pools
        self._first = [0, *accumulate(pool.slots for pool in pools)]
        self._columns = max(pool.columns for pool in pools)
        count = self._first[-1]
        self._state = replace(
            self._empty(count, None),
            cache=KVCache.below([compiled.model.init_cache(pool.slots, pool.columns) for pool in pools]),
        )
        self._end_tokens = jnp.asarray(list(end_tokens), jnp.int32)
        self._most = np.ones(count, np.int32)
        self._options = [RowOptions()] * count
        # A chunk that reached over the end would be written before it.
        self._stage_columns = -(-self._columns // self._widths[0]) * self._widths[0] + self._widths[-1]
        self._stage: State | None = None
        self._beginnings = beginnings

    def fill(
        self, pool: int, slots: Sequence[int], rows: Sequence[Row], start: int, width: int, *, last: bool
    ) -> None:
        """Computes the tokens [start, start + width) of rows, counted behind those that each shares.

        Never the last one of a row, which makes the next. A group's rows begin and end with one call; with
        `last` they are in their slots.
        """
        grouped = width in self._groups and start == 0 and last
        fitting = width if grouped else next(each for each in self._widths if each >= width)
        # Attention reads all columns, so there are no more than must be; they grow from chunk to chunk.
        end = max(row.shared for row in rows) + start + fitting
        columns = min(self._stage_columns, _power_of_two(end))
        if start == 0:
            lanes = self._groups[width] if grouped else lanes_for(self._compiled, 1)
            self._stage = self._staged([*rows, *[rows[0]] * (lanes - len(rows))], columns)
        assert self._stage is not None
        part, self._stage = self._stage, None
        lanes = len(part.finished)
        if part.cache.max_length < columns:
            wider = self._empty(lanes, columns)
            part = self._compiled(_place, wider, part, jnp.arange(lanes, dtype=jnp.int32))
        part, _ = self._compiled(fill, part, _rope(lanes), width=fitting, outputs=frozenset())
        if not last:
            self._stage = part
            return
        where = [*slots, *[slots[0]] * (lanes - len(slots))]
        self._state = self._compiled(
            _place_in_pool,
            self._state,
            part,
            jnp.asarray(where, jnp.int32),
            pool=pool,
            first=self._first[pool],
        )
        for slot, row in zip(slots, rows, strict=True):
            self._most[self._first[pool] + slot] = row.most
            self._options[self._first[pool] + slot] = row.options

    def decode(self) -> Decoded:
        """Some tokens for every slot that has not finished.

        There are two programs: greedy search alone is cheaper where all rows want nothing else.
        """
        plain = all(each.plain for each in self._options)
        settings = Settings(
            before=() if plain else processors(self._options, self._end_tokens),
            after=(),
            end_tokens=self._end_tokens,
            max_new_tokens=jnp.asarray(self._most),
            rope=_rope(self._first[-1]),
            key=None if plain else keys(self._options),
        )
        self._state, report = self._compiled(
            loop, self._state, settings, STEPS, most=STEPS, outputs=frozenset()
        )
        done, tokens, finished, stale = jax.device_get(
            (report.steps, report.tokens, report.finished, report.refill)
        )
        return Decoded(tokens[:done, :, 0], finished, stale)

    def number(self, pool: int, slot: int) -> int:
        """Which of all slots it is, in what `decode` gives."""
        return self._first[pool] + slot

    def retire(self, numbers: Sequence[int] | None = None) -> None:
        """These slots, or all, make no more tokens until a row is put into them."""
        chosen = np.full(self._first[-1], numbers is None)
        chosen[list(numbers or ())] = True
        for number in np.flatnonzero(chosen):
            self._options[number] = RowOptions()
        self._state = self._compiled(_retire, self._state, jnp.asarray(chosen))

    def _empty(self, rows: int, columns: int | None) -> State:
        """Rows that have nothing to do, with as many columns in the cache; None: it has none yet."""
        cache: Any = None if columns is None else self._compiled.model.init_cache(rows, columns)
        return State(_rows([((), 0)] * rows, self._columns), jnp.ones(rows, bool), cache)

    def _staged(self, rows: Sequence[Row], columns: int) -> State:
        """Rows beside the slots, of which what they share is computed and nothing else."""
        state = replace(
            self._empty(len(rows), columns),
            sequences=_rows([(row.ids, row.new) for row in rows], self._columns),
            finished=jnp.zeros(len(rows), bool),
        )
        for lane, row in enumerate(rows):
            if row.shared:
                state = self._compiled(_begin, state, self._beginnings.of(row), jnp.int32(lane))
        return state


class Beginnings:
    """The caches of what prompts share; a row of each, computed when it is first asked for.

    Args:
        compiled: the model.
        columns: places for tokens, of the longest prompt.
        widths: tokens that are computed at a time.
        kept: as many; those longest unused go.
    """

    def __init__(
        self, compiled: CompiledModel, columns: int, *, widths: Sequence[int], kept: int = KEPT
    ) -> None:
        self._compiled, self._columns, self._widths, self._kept = compiled, columns, sorted(widths), kept
        self._made: OrderedDict[tuple[bytes, tuple[int, ...]], KVCache] = OrderedDict()
        self.computed = 0
        """Tokens, so far."""

    def of(self, row: Row) -> KVCache:
        """What the row shares, under the frequencies that its length asks for."""
        config, length = self._compiled.model.config, len(row.ids)
        frequencies = config.rope_scaling.frequencies(config.rope_base, jnp.asarray([length]))
        key = b"".join(np.asarray(each).tobytes() for each in frequencies), tuple(row.ids[: row.shared])
        if key not in self._made:
            self._made[key] = self._computed(key[1], length)
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def _computed(self, ids: tuple[int, ...], length: int) -> KVCache:
        """As the beginning of a row of that length."""
        lanes = lanes_for(self._compiled, 1)
        # One token more, which would make the next and is not computed.
        state = State(
            _rows([([*ids, 0], 0)] * lanes, self._columns),
            jnp.zeros(lanes, bool),
            self._compiled.model.init_cache(lanes, _power_of_two(len(ids)) + self._widths[-1]),
        )
        rope = RopeChoice(jnp.full(lanes, length, jnp.int32), jnp.int32(NEVER))
        self.computed += len(ids)
        left = len(ids)
        while left > 0:
            width = next((each for each in self._widths if each >= left), self._widths[-1])
            state, _ = self._compiled(fill, state, rope, width=width, outputs=frozenset())
            left -= width
        return state.cache


def lanes_for(compiled: CompiledModel, rows: int) -> int:
    """Rows that are computed together where `rows` are wanted: as many as the mesh divides."""
    each = shards(compiled.mesh, "batch")
    return -(-rows // each) * each


def _power_of_two(columns: int) -> int:
    return max(SMALLEST, 1 << (columns - 1).bit_length())


def _rows(rows: Sequence[tuple[Sequence[int], int]], columns: int) -> Sequences:
    """Sequences of these ids, of which the last so many are new."""
    ids = np.zeros((len(rows), columns), np.int32)
    for index, (tokens, _) in enumerate(rows):
        ids[index, : len(tokens)] = tokens
    length = np.array([len(tokens) for tokens, _ in rows], np.int32)
    return Sequences(
        ids=jnp.asarray(ids),
        mask=jnp.asarray(np.arange(columns) < length[:, None]),
        length=jnp.asarray(length),
        new=jnp.asarray(np.array([new for _, new in rows], np.int32)),
    )


def _rope(rows: int) -> RopeChoice:
    return RopeChoice(jnp.zeros(rows, jnp.int32), jnp.int32(NEVER))


def _retire(model: Phi3ForCausalLM, state: State, slots: Bool[Array, " L"]) -> State:
    return replace(state, finished=state.finished | slots)


def _place(model: Phi3ForCausalLM, state: State, part: State, slots: Int[Array, " n"]) -> State:
    """`state` with the rows of `part` in `slots`; its cache may have more columns than `part`'s, or fewer.

    Where a slot is named twice, the first row stays.
    """
    columns = state.cache.mask.shape[1]
    part = replace(part, cache=_with_columns(part.cache, columns))
    for row in reversed(range(slots.shape[0])):
        state = jax.tree.map(lambda whole, new, row=row: _put(whole, new, slots[row], row), state, part)
    return state


def _place_in_pool(
    model: Phi3ForCausalLM, state: State, part: State, slots: Int[Array, " n"], *, pool: int, first: int
) -> State:
    """As `_place`, in the slots of a pool, of which the first is the `first` of all."""

    def own(vectors: Any) -> Any:
        return vectors.parts[pool]

    def back(vectors: Any, new: Any) -> RaggedVectors:
        return RaggedVectors([*vectors.parts[:pool], new, *vectors.parts[pool + 1 :]])

    cache = state.cache
    keys, values = ([own(each) for each in vectors] for vectors in (cache.keys, cache.values))
    columns = keys[0].shape[2]
    fitting: Any = _with_columns(part.cache, columns)
    for row in reversed(range(slots.shape[0])):
        keys, values = (
            [_put(whole, new, slots[row], row) for whole, new in zip(old, news, strict=True)]
            for old, news in ((keys, fitting.keys), (values, fitting.values))
        )
    rest = replace(cache, keys=[], values=[])
    others = replace(_with_columns(part.cache, cache.mask.shape[1]), keys=[], values=[])
    placed = _place(model, replace(state, cache=rest), replace(part, cache=others), first + slots)
    cache = replace(
        placed.cache,
        keys=[back(old, new) for old, new in zip(cache.keys, keys, strict=True)],
        values=[back(old, new) for old, new in zip(cache.values, values, strict=True)],
    )
    return replace(placed, cache=cache)


def _begin(model: Phi3ForCausalLM, state: State, beginning: KVCache, lane: Int[Array, ""]) -> State:
    """`state` with a beginning's cache in a lane."""
    fitting = _with_columns(beginning, state.cache.mask.shape[1])
    cache = jax.tree.map(lambda whole, new: _put(whole, new, lane, 0), state.cache, fitting)
    return replace(state, cache=cache)


def _with_columns(cache: KVCache, columns: int) -> KVCache:
    """The cache with no more columns, and with a mask of just so many; the others hold nothing."""
    mask = cache.mask[:, :columns]
    cut = jax.tree.map(lambda x: x[:, :, :columns] if x.ndim > 2 else x, cache)
    return replace(cut, mask=jnp.pad(mask, ((0, 0), (0, columns - mask.shape[1]))))


def _put(whole: Array, new: Array, slot: Int[Array, ""], row: int) -> Array:
    """A row of `new` in the first columns of a slot; a row at a time is in place on every platform."""
    at: list[Any] = [slot, *[0] * (whole.ndim - 1)]
    return jax.lax.dynamic_update_slice(whole, new[row : row + 1].astype(whole.dtype), at)
