"""One call of generate, from the host's side: dispatches the compiled steps and hears what they report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.generation import prompts
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.forward import Records, fill, needs_recomputation, next_logits, process
from phi3_jax.generation.prompts import (
    PromptLayout,
    cache_length,
    padded_length,
    padded_rows,
    recomputation_chunk,
)
from phi3_jax.generation.sampling import Report, select
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import State, StepSettings
from phi3_jax.parallel.sharding import shards

ROOM = 512
"""Columns for new tokens to begin with; the cache doubles when they are used up."""

HostProcessors = Callable[[Sequences, Float[Array, "R V"]], Float[Array, "R V"]]
"""The part of the logits processors that is not compiled."""


@dataclass(frozen=True)
class GeneratedTokens:
    """What a dispatch has made, on the host."""

    tokens: Int[np.ndarray, "steps R n"]
    finished: Bool[np.ndarray, " R"]
    records: Records
    """Still on the device."""


_process = jax.jit(process, static_argnames="normalize")
_select = jax.jit(select, donate_argnums=1)
_take = jax.jit(lambda state, lanes: state.take(lanes))
_widen = jax.jit(lambda state, columns: state.widen(columns), static_argnums=1)
_truncate = jax.jit(lambda state, new, finished: state.truncate(new, finished), donate_argnums=0)
_needs_recomputation = jax.jit(needs_recomputation, static_argnums=0)
_put = jax.jit(KVCache.put, donate_argnums=0)

Dispatch = Callable[[Any], tuple[Any, Report]]
"""Sends some steps on their way: from the state to the state behind them and what they report."""


class DecodingEngine:
    """Rows of one batch on their way: the state on the device and how it is moved forward.

    Args:
        compiled: the model.
        layout: each lane's prompt, none for a dummy that fills the batch up to one of a few sizes; under
            guidance the second half are the unconditional twins of the first.
        settings: for as many lanes.
        max_new_tokens: at most made by each row.
        new_cache: makes a cache of `(lanes, columns)`.
        past: a cache that holds the beginning of the first rows.
        outputs: what to record, of scores, logits, attentions and hidden_states.
        grows: start with a cache for part of the tokens, and double it when that is full.
        on_host: logits processors that do not run on the device: (sequences, scores) -> scores.
        spare: columns behind a row's last token that a step may write.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        layout: PromptLayout,
        settings: StepSettings,
        *,
        max_new_tokens: int,
        new_cache: Callable[[int, int], KVCache],
        past: KVCache | None = None,
        grows: bool = True,
        outputs: frozenset[str] = frozenset(),
        on_host: HostProcessors | None = None,
        spare: int = 0,
    ):
        self.compiled, self.settings, self.outputs, self.on_host = compiled, settings, outputs, on_host
        self.layout = layout
        self._new_cache, self.spare = new_cache, spare
        used = int(layout.length.max())
        # A write that reaches over the end would be moved back, onto what is there: no step must do that, not
        # even one that feeds a lane nothing.
        least = used + max(spare, 1)
        if not layout.aligned:
            least = used + max(spare, min(padded_length(layout.pending), prompts.PREFILL_CHUNK))
        self._limit = cache_length(max(used + max_new_tokens + max(spare, 1), least))
        columns = cache_length(max(used + min(max_new_tokens, ROOM) + max(spare, 1), least))
        if not grows:
            columns = self._limit
        elif past is not None and past.max_length >= least:
            columns = cache_length(past.max_length)  # grown when it is full: a conversation compiles less
        self._limit = max(self._limit, columns)
        room = ((0, 0), (0, columns - layout.ids.shape[1]))
        lanes = len(layout.ids)
        cache = new_cache(lanes, columns)
        if past is not None:
            past = past.rewind(jnp.asarray(layout.cached[: past.batch_size]))
            past = past if past.window is not None else past.resize(columns)
            cache = _put(cache, jnp.arange(past.batch_size), past)
        sequences = Sequences(
            ids=jnp.asarray(np.pad(layout.ids, room)),
            mask=jnp.asarray(np.pad(layout.mask, room)),
            length=jnp.asarray(layout.length),
            new=jnp.zeros(lanes, jnp.int32),
        )
        # A State, or what beams and assistants build around one.
        self.state: Any = State(sequences, jnp.asarray(~layout.mask.any(axis=1)), cache)
        self.prefill_records: list[Records] = []

    @property
    def rows(self) -> int:
        """Lanes that make tokens; under guidance as many again are their twins."""
        lanes = self.state.finished.shape[0]
        return lanes // 2 if self.settings.guidance_scale is not None else lanes

    def prefill(self) -> Float[Array, "L V"]:
        """Computes the prompts, in chunks, and gives the logits behind them."""
        if not self.layout.aligned:  # what a returned cache holds may be of the other rope list
            self._recompute_changed()
        pending = self.layout.pending
        while pending > prompts.PREFILL_CHUNK:
            self._fill(prompts.PREFILL_CHUNK)
            pending -= prompts.PREFILL_CHUNK
        aligned = self.layout.aligned
        logits, self.state, records = self.compiled(
            next_logits,
            self.state,
            self.settings.rope,
            width=pending if aligned else min(padded_length(pending), prompts.PREFILL_CHUNK),
            aligned=aligned,
            outputs=self.outputs,
        )
        self.prefill_records.append(records)
        return logits

    def fill_up(self) -> None:
        """Computes the prompts but for their last column, without logits."""
        width = recomputation_chunk(self.state.sequences.ids.shape[1])
        if self.layout.aligned:
            width = min(self.layout.pending, width)
        for _ in range(0, self.layout.pending - 1, width):
            self._fill(width)

    def _fill(self, width: int) -> None:
        self.state, records = self.compiled(
            fill, self.state, self.settings.rope, width=width, outputs=self.outputs
        )
        self.prefill_records.append(records)

    def repeat(self, times: int) -> Int[np.ndarray, " L2"]:
        """Every row `times` times, one beside the other; gives the lane that each was."""
        lanes = np.repeat(np.arange(len(self.layout.ids)), times)
        if times > 1:
            self.state = _take(self.state, lanes)
            self.settings = self.settings._replace(rope=self.settings.rope.take(lanes))
        return lanes

    def choose(self, logits: Float[Array, "L V"], records: Records) -> GeneratedTokens:
        """A token for each row from its logits, the host's processors included."""
        scores = _process(logits, self.state.sequences, self.settings)
        if self.on_host is not None:
            scores = self.on_host(self.state.sequences, scores)
        self.state, tokens, scores = _select(scores, self.state, self.settings)
        own = {"logits": logits[: self.rows, None], "scores": scores[:, None]}
        records = records | {name: own[name] for name in self.outputs & own.keys()}
        return GeneratedTokens(
            np.asarray(tokens)[None, :, None],
            np.asarray(self.state.finished)[: self.rows],
            jax.tree.map(lambda x: x[None], records),
        )

    def steps(
        self, dispatch: Dispatch, *, ahead: bool, refill: Callable[[np.ndarray], None] | None = None
    ) -> Iterator[GeneratedTokens]:
        """Tokens until every row has ended; `prefill` and `choose` come first.

        With `ahead`, the next dispatch is on its way before a report is read, so that the device never waits
        for the host. Without, the caller may change the state (`truncate`) between two dispatches. `refill`
        sees to lanes under the wrong rope list in place of the method of that name.
        """
        pending = None
        while True:
            report = self._send(dispatch) if pending is None else pending
            pending = self._send(dispatch) if ahead else None
            done, finished, stale, tokens = jax.device_get(
                (report.steps, report.finished, report.needs_recomputation, report.tokens)
            )
            if done:
                yield GeneratedTokens(
                    tokens[:done], finished, jax.tree.map(lambda x, n=done: x[:n], report.records)
                )
            if finished.all():
                return
            # In these two cases the dispatch that is on its way has found nothing to do.
            if stale.any():
                (refill or self.refill)(stale)
                pending = None
            elif not done:
                self.widen()
                pending = None

    def _send(self, dispatch: Dispatch) -> Report:
        self.state, report = dispatch(self.state)
        return report

    def steps_with_host(self) -> Iterator[GeneratedTokens]:
        """As `steps`, one by one, with the processors that run on the host between logits and choice."""
        while True:
            logits, records = self.one_step()
            made = self.choose(logits, records)
            yield made
            if made.finished.all():
                return

    def one_step(self) -> tuple[Float[Array, "L V"], Records]:
        """Feeds each lane's latest token; before that, sees to rope lists and room."""
        self._recompute_changed()
        if int(jnp.max(self.state.sequences.length)) >= self.state.sequences.ids.shape[1]:
            self.widen()
        logits, self.state, records = self.compiled(
            next_logits, self.state, self.settings.rope, width=1, aligned=True, outputs=self.outputs
        )
        return logits, records

    def truncate(self, new: Int[np.ndarray, " R"], finished: Bool[np.ndarray, " R"]) -> None:
        """Takes back what rows made beyond their `new` first tokens and ends those that are `finished`."""
        twins = self.state.finished.shape[0] // self.rows
        self.state = _truncate(self.state, jnp.tile(new, twins), jnp.tile(finished, twins))

    def widen(self) -> None:
        """Twice the columns, up to what can ever be needed."""
        columns = self.state.sequences.ids.shape[1]
        self.state = _widen(self.state, min(self._limit, cache_length(2 * columns)))

    def _recompute_changed(self) -> None:
        changed = np.asarray(_needs_recomputation(self.compiled.model.config, self.state, self.settings.rope))
        if changed.any():
            self.refill(changed)

    def refill(self, changed: Bool[np.ndarray, " L"]) -> None:
        """Computes the cache of these lanes again under the rope list that they now need, and no other's."""
        numbers = np.flatnonzero(changed)
        lanes, columns = changed.shape[0], self.state.sequences.ids.shape[1]
        index = np.full(
            padded_rows(len(numbers), shards(self.compiled.mesh, "batch")), lanes
        )  # dummies lie past the batch
        index[: len(numbers)] = numbers
        part = State(
            jax.tree.map(lambda x: x[index], self.state.sequences),
            jnp.asarray(index == lanes),
            self._new_cache(len(index), columns),
        )
        rope = self.settings.rope.take(index)
        pending = int(np.asarray(self.state.sequences.length)[numbers].max()) - 1
        width = recomputation_chunk(columns)
        for _ in range(0, pending, width):
            part, _ = self.compiled(fill, part, rope, width=width, outputs=frozenset())
        self.state = self.state.with_cache(_put(self.state.cache, jnp.asarray(index), part.cache))
