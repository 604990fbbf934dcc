"""Slots on the device: prompts are computed beside them, put into them, and make tokens together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.batch.options import RowOptions, keys, processors
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.forward import fill
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, Settings, State
from phi3_jax.model import KVCache

STEPS = 8
"""Tokens a slot in one dispatch, at most: those behind an answer's end are computed in vain."""

NEVER = np.iinfo(np.int32).max


class Row(NamedTuple):
    """A prompt, and what it has made so far."""

    ids: list[int]
    """Prompt and answer."""
    new: int
    """Tokens of the answer."""
    most: int
    """That the answer may have."""
    options: RowOptions = RowOptions()


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
    ):
        self._compiled, self._widths = compiled, sorted(widths)
        self._groups = {width: rows for rows, width in groups}
        self.count, self.columns = count, columns
        model = compiled.model
        self._state = State(
            _sequences(count, columns), jnp.ones(count, bool), model.init_cache(count, columns)
        )
        self._end_tokens = jnp.asarray(list(end_tokens), jnp.int32)
        self._most = np.ones(count, np.int32)
        self._options = [RowOptions()] * count
        # A chunk that reached over the end would be written before it.
        self._stage_columns = -(-columns // self._widths[0]) * self._widths[0] + self._widths[-1]
        self._stage: State | None = None

    def fill(self, slots: Sequence[int], rows: Sequence[Row], start: int, width: int, *, last: bool) -> None:
        """Computes the tokens [start, start + width) of rows, but never the last one, which makes the next.

        A group's rows begin and end with one call; with `last` they are in their slots.
        """
        grouped = width in self._groups and start == 0 and last
        fitting = width if grouped else next(each for each in self._widths if each >= width)
        if start == 0:
            lanes = self._groups[width] if grouped else 1
            filled = [*rows, *[rows[0]] * (lanes - len(rows))]
            self._stage = self._staged(filled, fitting if last else self._stage_columns)
        assert self._stage is not None
        part, self._stage = self._stage, None
        lanes = len(part.finished)
        part, _ = self._compiled(fill, part, _rope(lanes), width=fitting, outputs=frozenset())
        if not last:
            self._stage = part
            return
        where = [*slots, *[slots[0]] * (lanes - len(slots))]
        self._state = _place(self._state, part, jnp.asarray(where, jnp.int32))
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
        self._state = _retire(self._state, jnp.asarray(chosen))

    def _staged(self, rows: Sequence[Row], columns: int) -> State:
        """Rows beside the slots, nothing of them computed."""
        ids = np.zeros((len(rows), self.columns), np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
        length = np.array([len(row.ids) for row in rows], np.int32)
        sequences = Sequences(
            ids=jnp.asarray(ids),
            mask=jnp.asarray(np.arange(self.columns) < length[:, None]),
            length=jnp.asarray(length),
            new=jnp.asarray(np.array([row.new for row in rows], np.int32)),
        )
        cache = self._compiled.model.init_cache(len(rows), columns)
        return State(sequences, jnp.zeros(len(rows), bool), cache)


def _sequences(rows: int, columns: int) -> Sequences:
    return Sequences(
        ids=jnp.zeros((rows, columns), jnp.int32),
        mask=jnp.zeros((rows, columns), bool),
        length=jnp.zeros(rows, jnp.int32),
        new=jnp.zeros(rows, jnp.int32),
    )


def _rope(rows: int) -> RopeChoice:
    return RopeChoice(jnp.zeros(rows, jnp.int32), jnp.int32(NEVER))


@partial(jax.jit, donate_argnums=0)
def _retire(state: State, slots: Bool[Array, " L"]) -> State:
    return replace(state, finished=state.finished | slots)


@partial(jax.jit, donate_argnums=0)
def _place(state: State, part: State, slots: Int[Array, " n"]) -> State:
    """`state` with the rows of `part` in `slots`; its cache may have more columns than `part`'s, or fewer.

    Row by row, which is in place on every platform; where a slot is named twice, the first row stays.
    """

    def put(whole: Array, new: Array) -> Array:
        if whole.ndim > 2:
            new = new[:, :, : whole.shape[2]]
        for row in reversed(range(new.shape[0])):
            at: list[Any] = [slots[row], *[0] * (whole.ndim - 1)]
            whole = jax.lax.dynamic_update_slice(whole, new[row : row + 1].astype(whole.dtype), at)
        return whole

    cache: KVCache = part.cache
    columns = state.cache.mask.shape[1]
    mask = cache.mask[:, :columns]
    cache = replace(cache, mask=jnp.pad(mask, ((0, 0), (0, columns - mask.shape[1]))))
    return jax.tree.map(put, state, replace(part, cache=cache))
