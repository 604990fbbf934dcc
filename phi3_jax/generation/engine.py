"""The host's side of one call of generate: dispatches compiled steps and reads their reports."""

from collections.abc import Callable, Iterator, Sequence
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
from phi3_jax.generation.sampling import Report, score_records, select
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import State, StepSettings
from phi3_jax.parallel.sharding import shards

INITIAL_ROOM = 512
"""Slots for new tokens at the start; the cache doubles when they are used up."""

HostProcessors = Callable[[Sequences, Float[Array, "R V"]], Float[Array, "R V"]]
"""The part of the logits processors that is not compiled."""


@dataclass(frozen=True)
class StepResult:
    """The result of one dispatch, on the host."""

    tokens: Int[np.ndarray, "steps R n"]
    finished: Bool[np.ndarray, " R"]
    records: Records
    """Still on the device."""


_process = jax.jit(process, static_argnames="normalize")
_select = jax.jit(select, donate_argnums=1)
_take = jax.jit(lambda state, rows: state.take(rows))
_resize = jax.jit(lambda state, slots: state.resize(slots), static_argnums=1)
_truncate = jax.jit(lambda state, new, finished: state.truncate(new, finished), donate_argnums=0)
_needs_recomputation = jax.jit(needs_recomputation, static_argnums=0)
_put = jax.jit(KVCache.put, donate_argnums=0)

Dispatch = Callable[[Any], tuple[Any, Report]]
"""Sends some steps to the device; returns the state after them and their report, both still to come."""


class DecodingEngine:
    """Generates tokens for the rows of one batch: holds the state on the device and runs steps on it.

    Args:
        compiled: the model.
        layout: the prompt of each row; padding rows, which bring the batch to one of a few sizes, have none.
            With guidance the second half are the unconditional rows of the first half.
        settings: for as many rows.
        max_new_tokens: the limit of each row.
        new_cache: makes a cache of `(rows, slots)`.
        past: a cache that holds a prefix of the first rows.
        outputs: the outputs to record, of scores, logits, attentions and hidden_states.
        grows: start with a cache for part of the tokens, and double it when that is full.
        on_host: logits processors that do not run on the device: (sequences, scores) -> scores.
        spare: slots after a row's last token that a step may write.
        embeddings: of the first rows, in the place of their first ids.
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
        embeddings: Sequence[Float[np.ndarray, "n D"]] | None = None,
    ):
        self.compiled, self.settings, self.outputs, self.on_host = compiled, settings, outputs, on_host
        self.layout = layout
        self._embeddings = None if embeddings is None else layout.embeddings(embeddings)
        self._new_cache, self.spare = new_cache, spare
        used = int(layout.length.max())
        # A write that reaches past the end would be moved back onto used slots. No step may do that, not
        # even one that feeds a row nothing.
        least = used + max(spare, 1)
        if not layout.aligned:
            least = used + max(spare, min(padded_length(layout.pending), prompts.PREFILL_CHUNK))
        self._limit = cache_length(max(used + max_new_tokens + max(spare, 1), least))
        slots = cache_length(max(used + min(max_new_tokens, INITIAL_ROOM) + max(spare, 1), least))
        if not grows:
            slots = self._limit
        elif past is not None and past.max_length >= least:
            slots = cache_length(past.max_length)  # grown when it is full: a conversation compiles less
        self._limit = max(self._limit, slots)
        room = ((0, 0), (0, slots - layout.ids.shape[1]))
        rows = len(layout.ids)
        cache = new_cache(rows, slots)
        if past is not None:
            past = past.rewind(jnp.asarray(layout.cached[: past.batch_size]))
            past = past if past.window is not None else past.resize(slots)
            cache = _put(cache, jnp.arange(past.batch_size), past)
        sequences = Sequences(
            ids=jnp.asarray(np.pad(layout.ids, room)),
            mask=jnp.asarray(np.pad(layout.mask, room)),
            length=jnp.asarray(layout.length),
            new=jnp.zeros(rows, jnp.int32),
        )
        # A State, or what beams and assistants build around one.
        self.state: Any = State(sequences, jnp.asarray(~layout.mask.any(axis=1)), cache)
        self.prefill_records: list[Records] = []

    @property
    def rows(self) -> int:
        """The number of rows that generate tokens: all but the unconditional ones."""
        rows = self.state.finished.shape[0]
        return rows // 2 if self.settings.guidance_scale is not None else rows

    def prefill(self) -> Float[Array, "B V"]:
        """Computes the prompts in chunks; returns the logits after them."""
        if not self.layout.aligned:  # a returned cache may hold other rope frequencies
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
            self._embeddings,
            width=pending if aligned else min(padded_length(pending), prompts.PREFILL_CHUNK),
            aligned=aligned,
            outputs=self.outputs,
        )
        self.prefill_records.append(records)
        return logits

    def fill_up(self) -> None:
        """Computes the prompts except for their last token, without logits."""
        width = recomputation_chunk(self.state.sequences.ids.shape[1])
        if self.layout.aligned:
            width = min(self.layout.pending, width)
        for _ in range(0, self.layout.pending - 1, width):
            self._fill(width)

    def _fill(self, width: int) -> None:
        self.state, records = self.compiled(
            fill, self.state, self.settings.rope, self._embeddings, width=width, outputs=self.outputs
        )
        self.prefill_records.append(records)

    def repeat(self, times: int) -> Int[np.ndarray, " B2"]:
        """Repeats every row `times` times, copies next to each other; returns each new row's old number."""
        rows = np.repeat(np.arange(len(self.layout.ids)), times)
        if times > 1:
            self.state = _take(self.state, rows)
            self.settings = self.settings._replace(rope=self.settings.rope.take(rows))
            self._embeddings = self._embeddings and self._embeddings.take(rows)
        return rows

    def choose(self, logits: Float[Array, "B V"], records: Records) -> StepResult:
        """Chooses a token for each row from its logits, with the host's processors."""
        scores = _process(logits, self.state.sequences, self.settings)
        if self.on_host is not None:
            scores = self.on_host(self.state.sequences, scores)
        self.state, tokens, scores = _select(scores, self.state, self.settings)
        records = records | score_records(logits, scores, self.outputs)
        return StepResult(
            np.asarray(tokens)[None, :, None],
            np.asarray(self.state.finished)[: self.rows],
            jax.tree.map(lambda x: x[None], records),
        )

    def steps(
        self, dispatch: Dispatch, *, ahead: bool, recompute: Callable[[np.ndarray], None] | None = None
    ) -> Iterator[StepResult]:
        """Generates tokens until every row has ended; `prefill` and `choose` come first.

        With `ahead`, the next dispatch is sent before a report is read, so the device never waits for the
        host. Without, the caller may change the state (`truncate`) between two dispatches. `recompute`
        replaces the method of that name.
        """
        next_report = None
        while True:
            report = self._send(dispatch) if next_report is None else next_report
            next_report = self._send(dispatch) if ahead else None
            done, finished, outdated, tokens = jax.device_get(
                (report.steps, report.finished, report.needs_recomputation, report.tokens)
            )
            if done:
                yield StepResult(
                    tokens[:done], finished, jax.tree.map(lambda x, n=done: x[:n], report.records)
                )
            if finished.all():
                return
            # In these two cases the dispatch sent ahead had nothing to do.
            if outdated.any():
                (recompute or self.recompute)(outdated)
                next_report = None
            elif not done:
                self.grow()
                next_report = None

    def _send(self, dispatch: Dispatch) -> Report:
        self.state, report = dispatch(self.state)
        return report

    def steps_with_host(self) -> Iterator[StepResult]:
        """Generates tokens one by one, with the host's processors between logits and choice."""
        while True:
            logits, records = self.one_step()
            result = self.choose(logits, records)
            yield result
            if result.finished.all():
                return

    def one_step(self) -> tuple[Float[Array, "B V"], Records]:
        """Feeds each row's latest token, after recomputing and growing the cache where needed."""
        self._recompute_changed()
        if int(jnp.max(self.state.sequences.length)) >= self.state.sequences.ids.shape[1]:
            self.grow()
        logits, self.state, records = self.compiled(
            next_logits, self.state, self.settings.rope, width=1, aligned=True, outputs=self.outputs
        )
        return logits, records

    def truncate(self, new: Int[np.ndarray, " R"], finished: Bool[np.ndarray, " R"]) -> None:
        """Keeps each row's first `new` generated tokens and ends the rows in `finished`."""
        copies = self.state.finished.shape[0] // self.rows
        self.state = _truncate(self.state, jnp.tile(new, copies), jnp.tile(finished, copies))

    def grow(self) -> None:
        """Doubles the slots, up to the most that can be needed."""
        slots = self.state.sequences.ids.shape[1]
        self.state = _resize(self.state, min(self._limit, cache_length(2 * slots)))

    def _recompute_changed(self) -> None:
        outdated = np.asarray(
            _needs_recomputation(self.compiled.model.config, self.state, self.settings.rope)
        )
        if outdated.any():
            self.recompute(outdated)

    def recompute(self, outdated: Bool[np.ndarray, " B"]) -> None:
        """Computes the cache of these rows, and no others, again under their present rope frequencies."""
        numbers = np.flatnonzero(outdated)
        rows, slots = outdated.shape[0], self.state.sequences.ids.shape[1]
        # The number past the last row stands for padding rows.
        index = np.full(padded_rows(len(numbers), shards(self.compiled.mesh, "batch")), rows)
        index[: len(numbers)] = numbers
        part = State(
            jax.tree.map(lambda x: x[index], self.state.sequences),
            jnp.asarray(index == rows),
            self._new_cache(len(index), slots),
        )
        rope = self.settings.rope.take(index)
        embeddings = self._embeddings and self._embeddings.take(index)
        pending = int(np.asarray(self.state.sequences.length)[numbers].max()) - 1
        width = recomputation_chunk(slots)
        for _ in range(0, pending, width):
            part, _ = self.compiled(fill, part, rope, embeddings, width=width, outputs=frozenset())
        self.state = self.state.with_cache(_put(self.state.cache, jnp.asarray(index), part.cache))
