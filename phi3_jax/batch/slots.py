"""The slots on the device: prompts are prefilled, copied into slots and decoded together."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.batch.options import RowOptions, row_keys, row_processors
from phi3_jax.batch.prefill import (
    BatchRow,
    PrefillBuffer,
    PrefixCache,
    own_rope,
    sequences_of,
    smallest_width,
)
from phi3_jax.batch.scheduler import PoolSize, Prefill
from phi3_jax.cache import KVCache
from phi3_jax.cache.layer_cache import write_row
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.sampling import loop
from phi3_jax.generation.state import State, StepSettings
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.sizes import round_up

STEPS = 8
"""The most tokens of a slot in one dispatch; those after the end of an answer are wasted."""


class Decoded(NamedTuple):
    """The result of one dispatch, on the host."""

    tokens: Int[np.ndarray, "steps slots"]
    """-1: no token."""
    finished: Bool[np.ndarray, " slots"]
    needs_recomputation: Bool[np.ndarray, " slots"]
    """The slots to prefill again with longrope's other factors before they decode further."""


class Slots:
    """The slots of all pools, which decode together.

    All shapes are fixed: the same few programs serve all prompts. A slot is identified by its pool and its
    number in the pool.

    Args:
        compiled: the model.
        pools: the number and length of slots; one position of a slot stays free.
        groups: (prompts, tokens of each) that are prefilled together.
        widths: the tokens of one prompt that are prefilled at a time; with its shared prefix, a prompt of a
            group has no more than the largest.
        end_tokens: each of them ends an answer.

    Raises:
        UserError: the mesh does not divide the slots.
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
        self._first = [0, *accumulate(pool.slots for pool in pools)]
        """The index of each pool's first slot among all slots."""
        count, length = self._first[-1], max(pool.length for pool in pools)
        model = compiled.model
        caches = [model.init_cache(pool.slots, pool.length, model.cache_dtype) for pool in pools]
        self._state = State(
            sequences_of([], count, length),
            jnp.ones(count, bool),
            KVCache.concatenate(caches),
        )
        self._end_tokens = jnp.asarray(list(end_tokens), jnp.int32)
        self._max_new_tokens = np.ones(count, np.int32)
        self._options = [RowOptions()] * count
        least, chunk = self._widths[0], self._widths[-1]
        # With less room, a write that starts near the end would be moved back.
        self._single = PrefillBuffer(compiled, 1, round_up(length, least) + chunk, length)
        self._groups = {width: PrefillBuffer(compiled, rows, chunk, length) for rows, width in groups}
        self.prefixes = PrefixCache(compiled, self._single, widths=widths)
        # Compile every combination of buffer and pool now; some occur rarely.
        for buffer in (self._single, *self._groups.values()):
            for pool in range(len(pools)):
                self._copy_row(buffer, 0, pool, 0)
        self.stop()

    def prefill(self, action: Prefill, rows: Sequence[BatchRow]) -> None:
        """Computes tokens of `rows`, which are those of the action's jobs, after their shared prefixes.

        The last token of a row is left to decoding. The last prefill of a row copies it to its slot.
        """
        buffer = self._groups[action.width] if action.grouped else self._single
        if action.start == 0:
            buffer.load(rows, [self.prefixes.blocks(row) for row in rows])
        buffer.prefill(action.width if action.grouped else smallest_width(action.width, self._widths))
        if not action.last:
            return
        for row_index, (slot, row) in enumerate(zip(action.slots, rows, strict=True)):
            self._copy_row(buffer, row_index, action.pool, slot)
            index = self.index(action.pool, slot)
            self._max_new_tokens[index] = row.max_new_tokens
            self._options[index] = row.options

    def decode(self) -> Decoded:
        """Generates some tokens in every slot that is not finished.

        There are two programs: one for greedy search only, which is cheaper, and one for all options.
        """
        greedy = all(each.is_plain_greedy for each in self._options)
        settings = StepSettings(
            before_host=LogitsProcessorList() if greedy else row_processors(self._options, self._end_tokens),
            after_host=LogitsProcessorList(),
            end_tokens=self._end_tokens,
            max_new_tokens=jnp.asarray(self._max_new_tokens),
            rope=own_rope(self._first[-1]),
            key=None if greedy else row_keys(self._options),
        )
        self._state, report = self._compiled(
            loop, self._state, settings, STEPS, most=STEPS, outputs=frozenset()
        )
        steps, tokens, finished, needs_recomputation = jax.device_get(
            (report.steps, report.tokens, report.finished, report.needs_recomputation)
        )
        return Decoded(tokens[:steps, :, 0], finished, needs_recomputation)

    def index(self, pool: int, slot: int) -> int:
        """Returns the index of a slot among all slots, as in `Decoded`."""
        return self._first[pool] + slot

    def stop(self, indices: Sequence[int] | None = None) -> None:
        """Stops these slots, or all, until a row is copied into them."""
        stopped = np.full(self._first[-1], indices is None)
        stopped[list(indices or ())] = True
        for index in np.flatnonzero(stopped):
            self._options[index] = RowOptions()
        self._state = self._compiled(_stop, self._state, jnp.asarray(stopped))

    def _copy_row(self, buffer: PrefillBuffer, row: int, pool: int, slot: int) -> None:
        at, first = jnp.asarray([row, slot], jnp.int32), self._first[pool]
        self._state = self._compiled(_copy_row, self._state, buffer.state, at, pool=pool, first=first)


def _stop(model: Phi3ForCausalLM, state: State, slots: Bool[Array, " B"]) -> State:
    return replace(state, finished=state.finished | slots)


def _copy_row(
    model: Phi3ForCausalLM, state: State, source: State, at: Int[Array, "2"], *, pool: int, first: int
) -> State:
    """Copies a row of `source` to a slot of a pool; `at`: row, slot.

    The caches of `source` may be longer or shorter than the slot. `first` is the index of the pool's first
    slot among all slots.
    """
    row_index, slot = at
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row_index, 1), source)
    cache, row_cache = state.cache, row.cache

    def write_vectors(ragged: Any, vectors: Array) -> Any:
        part = ragged.parts[pool]
        vectors = vectors[:, :, : part.shape[2]].astype(part.dtype)
        write = write_row if model.decoder.mesh is None else _write_row
        part = write(part, vectors, slot)
        return RaggedVectors([*ragged.parts[:pool], part, *ragged.parts[pool + 1 :]])

    keys, values = (
        [write_vectors(old, new) for old, new in zip(olds, news, strict=True)]
        for olds, news in ((cache.keys, row_cache.keys), (cache.values, row_cache.values))
    )
    length = cache.mask.shape[1]
    mask = row_cache.mask[:, :length]
    mask = jnp.pad(mask, ((0, 0), (0, length - mask.shape[1])))
    row = replace(row, cache=replace(row_cache, keys=[], values=[], mask=mask))
    state = replace(state, cache=replace(cache, keys=[], values=[]))
    state = jax.tree.map(lambda x, y: _write_row(x, y, first + slot), state, row)
    return replace(state, cache=replace(state.cache, keys=keys, values=values))


def _write_row(whole: Array, row: Array, index: Int[Array, ""]) -> Array:
    """Writes a row, which may be shorter, to the first positions of row `index`."""
    at = [index, *[jnp.int32(0)] * (whole.ndim - 1)]
    return jax.lax.dynamic_update_slice(whole, row.astype(whole.dtype), at)
