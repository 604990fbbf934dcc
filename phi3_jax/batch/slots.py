"""Slots on the device: prompts are put into them, and make tokens together."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.batch.options import RowOptions, keys, processors
from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.batch.stages import Beginnings, Row, Stage, fitting, no_choice, sequences_of
from phi3_jax.cache import KVCache
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.state import State, StepSettings
from phi3_jax.model import Phi3ForCausalLM

STEPS = 8
"""Tokens a slot in one dispatch, at most: those behind an answer's end are computed in vain."""


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
        widths: tokens of a single prompt that are computed at a time; a group's prompts have no more than the
            largest, those that they share included.
        end_tokens: any of which ends an answer.

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
    ):
        self._compiled, self._widths = compiled, sorted(widths)
        self._pools = pools
        self._first = [0, *accumulate(pool.slots for pool in pools)]
        count, columns = self._first[-1], max(pool.columns for pool in pools)
        self._state = State(
            sequences_of([], count, columns),
            jnp.ones(count, bool),
            KVCache.below([compiled.model.init_cache(pool.slots, pool.columns) for pool in pools]),
        )
        self._end_tokens = jnp.asarray(list(end_tokens), jnp.int32)
        self._most = np.ones(count, np.int32)
        self._options = [RowOptions()] * count
        least, chunk = self._widths[0], self._widths[-1]
        # A chunk that reached over the end would be written before it.
        self._single = Stage(compiled, 1, -(-columns // least) * least + chunk, columns)
        self._groups = {width: Stage(compiled, rows, chunk, columns) for rows, width in groups}
        self.beginnings = Beginnings(compiled, self._single, widths=widths)
        # Every way from a stage to a slot is compiled now: some are rare.
        for stage in (self._single, *self._groups.values()):
            for pool in range(len(pools)):
                self._place(stage, 0, pool, 0)
        self.retire()

    def fill(
        self,
        pool: int,
        slots: Sequence[int],
        rows: Sequence[Row],
        start: int,
        width: int,
        *,
        together: bool,
        last: bool,
    ) -> None:
        """Computes the tokens [start, start + width) of rows, counted behind those that each shares.

        Never the last one of a row, which makes the next. A group's rows, `together`, begin and end with one
        call; with `last` they are in their slots.
        """
        stage = self._groups[width] if together else self._single
        if start == 0:
            stage.begin(rows, [self.beginnings.of(row) for row in rows])
        stage.fill(width if together else fitting(width, self._widths))
        if not last:
            return
        for lane, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            self._place(stage, lane, pool, slot)
            self._most[self._first[pool] + slot] = row.most
            self._options[self._first[pool] + slot] = row.options

    def _place(self, stage: Stage, lane: int, pool: int, slot: int) -> None:
        at = jnp.asarray([lane, slot], jnp.int32)
        self._state = self._compiled(_place, self._state, stage.state, at, pool=pool, first=self._first[pool])

    def decode(self) -> Decoded:
        """Some tokens for every slot that has not finished.

        There are two programs: greedy search alone is cheaper where all rows want nothing else.
        """
        plain = all(each.plain for each in self._options)
        settings = StepSettings(
            before_host=LogitsProcessorList() if plain else processors(self._options, self._end_tokens),
            after_host=LogitsProcessorList(),
            end_tokens=self._end_tokens,
            max_new_tokens=jnp.asarray(self._most),
            rope=no_choice(self._first[-1]),
            key=None if plain else keys(self._options),
        )
        self._state, report = self._compiled(
            loop, self._state, settings, STEPS, most=STEPS, outputs=frozenset()
        )
        done, tokens, finished, stale = jax.device_get(
            (report.steps, report.tokens, report.finished, report.needs_recomputation)
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


def _retire(model: Phi3ForCausalLM, state: State, slots: Bool[Array, " L"]) -> State:
    return replace(state, finished=state.finished | slots)


def _place(
    model: Phi3ForCausalLM, state: State, part: State, at: Int[Array, "2"], *, pool: int, first: int
) -> State:
    """`state` with a lane of `part` in a slot of a pool, of which the first is the `first` of all.

    Caches of `part` may have more columns than the pool's, or fewer.
    """
    lane, slot = at
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, lane, 1), part)
    cache, new = state.cache, row.cache

    def vectors(old: Any, own: Array) -> RaggedVectors:
        whole = old.parts[pool]
        return RaggedVectors(
            [*old.parts[:pool], _put(whole, own[:, :, : whole.shape[2]], slot), *old.parts[pool + 1 :]]
        )

    keys, values = (
        [vectors(old, own) for old, own in zip(olds, owns, strict=True)]
        for olds, owns in ((cache.keys, new.keys), (cache.values, new.values))
    )
    columns = cache.mask.shape[1]
    mask = new.mask[:, :columns]
    new = replace(new, keys=[], values=[], mask=jnp.pad(mask, ((0, 0), (0, columns - mask.shape[1]))))
    old = replace(state, cache=replace(cache, keys=[], values=[]))
    placed = jax.tree.map(lambda x, y: _put(x, y, first + slot), old, replace(row, cache=new))
    return replace(placed, cache=replace(placed.cache, keys=keys, values=values))


def _put(whole: Array, new: Array, slot: Int[Array, ""]) -> Array:
    """A row in the first columns of a slot."""
    at: list[Any] = [slot, *[0] * (whole.ndim - 1)]
    return jax.lax.dynamic_update_slice(whole, new.astype(whole.dtype), at)
