"""Slots on the device: prompts are computed beside them, put into them, and make tokens together."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.batch.options import RowOptions, keys, processors
from phi3_jax.batch.prefixes import KEPT
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.forward import fill
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, Settings, State
from phi3_jax.model import KVCache, Phi3ForCausalLM

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
    """The slots of a pool, each with `columns` places for tokens.

    All shapes are fixed: whatever prompts come, the same few programs run.

    Args:
        compiled: the model.
        count: of slots.
        columns: of each; a row has at most as many tokens but one.
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
        count: int,
        columns: int,
        *,
        groups: Sequence[tuple[int, int]],
        widths: Sequence[int],
        end_tokens: Sequence[int],
        beginnings: "Beginnings",
    ):
        self._compiled, self._widths = compiled, sorted(widths)
        self._groups = {width: compiled.lanes_for(rows) for rows, width in groups}
        self.count, self.columns = count, columns
        self._state = self._empty(count, columns)
        self._end_tokens = jnp.asarray(list(end_tokens), jnp.int32)
        self._most = np.ones(count, np.int32)
        self._options = [RowOptions()] * count
        # A chunk that reached over the end would be written before it.
        self._stage_columns = -(-columns // self._widths[0]) * self._widths[0] + self._widths[-1]
        self._stage: State | None = None
        self._beginnings = beginnings

    def fill(self, slots: Sequence[int], rows: Sequence[Row], start: int, width: int, *, last: bool) -> None:
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
            lanes = self._groups[width] if grouped else self._compiled.lanes_for(1)
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
        self._state = self._compiled(_place, self._state, part, jnp.asarray(where, jnp.int32))
        for slot, row in zip(slots, rows, strict=True):
            self._most[slot] = row.most
            self._options[slot] = row.options

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
            rope=_rope(self.count),
            key=None if plain else keys(self._options),
        )
        self._state, report = self._compiled(
            loop, self._state, settings, STEPS, most=STEPS, outputs=frozenset()
        )
        done, tokens, finished, stale = jax.device_get(
            (report.steps, report.tokens, report.finished, report.refill)
        )
        return Decoded(tokens[:done, :, 0], finished, stale)

    def retire(self, slots: Sequence[int]) -> None:
        """These slots make no more tokens until a row is put into them."""
        for slot in slots:
            self._options[slot] = RowOptions()
        chosen = np.zeros(self.count, bool)
        chosen[list(slots)] = True
        self._state = self._compiled(_retire, self._state, jnp.asarray(chosen))

    def _empty(self, rows: int, columns: int) -> State:
        """Rows that have nothing to do, with as many columns in the cache."""
        cache = self._compiled.model.init_cache(rows, columns)
        return State(_rows([((), 0)] * rows, self.columns), jnp.ones(rows, bool), cache)

    def _staged(self, rows: Sequence[Row], columns: int) -> State:
        """Rows beside the slots, of which what they share is computed and nothing else."""
        state = replace(
            self._empty(len(rows), columns),
            sequences=_rows([(row.ids, row.new) for row in rows], self.columns),
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
        lanes = self._compiled.lanes_for(1)
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
