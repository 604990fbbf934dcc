"""Continuous batching: prompts of any length run through slots, and each free slot takes the next prompt."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.prefill import BatchRow
from phi3_jax.batch.prefixes import PrefixFinder
from phi3_jax.batch.scheduler import Decode, Job, PoolSize, Prefill, Scheduler
from phi3_jax.batch.slots import Slots
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.stopping import JoinedTokens

CHUNK = 512
WIDTHS = (128, 256, CHUNK)
"""The tokens of one prompt that are prefilled at a time; the smaller widths are for the last tokens."""

GROUPS = ((8, 32), (4, 128))
"""(prompts, tokens of each) that are prefilled together; alone, short prompts use the machine badly."""

BUDGET = 4 * CHUNK
"""The tokens to prefill between two decodes."""


T = TypeVar("T")


class Prompt(NamedTuple):
    """The tokens to continue, and the options of their continuation."""

    key: Any
    """Identifies the prompt to the caller."""
    ids: Sequence[int]
    max_new_tokens: int
    options: RowOptions = RowOptions()
    should_stop: Callable[[Sequence[int]], bool] | None = None
    """Receives all tokens of prompt and answer; True ends the answer. End tokens end it as well."""


class Continuation(NamedTuple):
    """The tokens that continue a prompt."""

    key: Any
    tokens: list[int]
    """The new tokens, with the end token if there is one."""
    finish_reason: str
    """ "stop" (an end token or `should_stop`) or "length" (`max_new_tokens` were generated)."""


@dataclass(frozen=True)
class Load:
    """The number of slots that are in use, and the tokens prefilled."""

    busy: int
    slots: int
    prompt_tokens: int
    """A shared prefix counts once; tokens that are computed again count again."""


@dataclass
class _ActivePrompt:
    prompt: Prompt
    prefix_length: int
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    """`should_stop` returned True."""

    def row(self) -> BatchRow:
        prompt = self.prompt
        ids = [*prompt.ids, *self.tokens]
        return BatchRow(ids, len(self.tokens), prompt.max_new_tokens, prompt.options, self.prefix_length)

    def add(self, tokens: Sequence[int]) -> None:
        """Adds tokens up to the one after which the answer should stop."""
        should_stop = self.prompt.should_stop
        row = JoinedTokens(self.prompt.ids, self.tokens)
        for token in tokens:
            self.tokens.append(token)
            if should_stop is not None and should_stop(row):
                self.stopped = True
                return


class ContinuousBatch:
    """Continues prompts with a fixed set of compiled programs and yields them as they finish.

    Args:
        compiled: the model.
        pools: the number and length of slots.
        end_tokens: each of them ends an answer.
        widths: the tokens of one prompt that are prefilled at a time.
        groups, budget: as for `Scheduler`.
        prefixes: finds shared prefixes; None: every prompt is computed by itself.

    Raises:
        UserError: the pools are invalid.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        pools: Sequence[PoolSize],
        *,
        end_tokens: Sequence[int],
        widths: Sequence[int] = WIDTHS,
        groups: Sequence[tuple[int, int]] = GROUPS,
        budget: int = BUDGET,
        prefixes: PrefixFinder | None = None,
    ):
        self._new_scheduler = partial(Scheduler, pools, chunk=max(widths), groups=groups, budget=budget)
        self._scheduler = self._new_scheduler()
        self._prefixes = prefixes
        self._max_length = max(pool.length for pool in pools)
        self._slots = Slots(compiled, pools, groups=groups, widths=widths, end_tokens=end_tokens)
        self._pools = range(len(pools))
        self._end_tokens = frozenset(end_tokens)
        self._slot_count = sum(pool.slots for pool in pools)
        self._prompt_tokens = 0

    @property
    def load(self) -> Load:
        """The current load of the slots."""
        computed = self._prompt_tokens + self._slots.prefixes.computed_tokens
        return Load(self._scheduler.busy, self._slot_count, computed)

    def run(self, prompts: Iterable[Prompt | T]) -> Iterator[Continuation | T]:
        """Yields continuations in the order in which they finish; takes prompts as slots become free.

        Objects among the prompts that are not a `Prompt` are yielded unchanged. Only one run is possible at a
        time; a run that is closed early frees its slots.

        Raises:
            UserError: a prompt has no tokens, or is too long for every slot.
        """
        active: dict[int, _ActivePrompt] = {}
        try:
            yield from self._run(enumerate(prompts), active)
        finally:
            if active:
                self._scheduler = self._new_scheduler()
                self._slots.stop()

    def _run(
        self, numbered: Iterator[tuple[int, Prompt | T]], active: dict[int, _ActivePrompt]
    ) -> Iterator[Continuation | T]:
        more = True
        while more or not self._scheduler.idle:
            while more and self._scheduler.waiting < self._slot_count:
                number, prompt = next(numbered, (None, None))
                if number is None or prompt is None:
                    more = False
                elif isinstance(prompt, Prompt):
                    self._add(number, prompt, active)
                else:
                    yield prompt
            action = self._scheduler.next()
            if isinstance(action, Prefill):
                self._slots.prefill(action, [active[job.number].row() for job in action.jobs])
            elif isinstance(action, Decode):
                yield from self._decode(active)

    def _add(self, number: int, prompt: Prompt, active: dict[int, _ActivePrompt]) -> None:
        if not len(prompt.ids) or prompt.max_new_tokens < 1:
            raise UserError(f"prompt {prompt.key!r} has no tokens, or max_new_tokens is below 1")
        length = slot_length(len(prompt.ids), prompt.max_new_tokens)
        if length > self._max_length:
            raise UserError(
                f"prompt {prompt.key!r} has {len(prompt.ids)} tokens and may get {prompt.max_new_tokens}: "
                f"slots hold {self._max_length - 1}"
            )
        prefix_length = 0 if self._prefixes is None else self._prefixes.shared_length(prompt.ids)
        self._scheduler.add(Job(number, max(len(prompt.ids) - 1 - prefix_length, 1), length, prefix_length))
        active[number] = _ActivePrompt(prompt, prefix_length)
        self._prompt_tokens += len(prompt.ids) - prefix_length

    def _decode(self, active: dict[int, _ActivePrompt]) -> Iterator[Continuation]:
        decoded = self._slots.decode()
        to_stop: list[int] = []
        finished: list[_ActivePrompt] = []
        for pool in self._pools:
            free: list[int] = []
            for slot, job in self._scheduler.running(pool).items():
                index, prompt = self._slots.index(pool, slot), active[job.number]
                tokens = decoded.tokens[:, index]
                prompt.add(np.extract(tokens >= 0, tokens).tolist())
                if prompt.stopped or decoded.finished[index]:
                    free.append(slot)
                    finished.append(active.pop(job.number))
                elif decoded.needs_recomputation[index]:
                    prompt.prefix_length = 0
                    count = len(prompt.row().ids) - 1
                    self._prompt_tokens += count
                    self._scheduler.recompute(pool, slot, count)
                else:
                    continue
                to_stop.append(index)
            self._scheduler.finish(pool, free)
        if to_stop:  # a slot that needs recomputation ends every decode at once
            self._slots.stop(to_stop)
        for prompt in finished:
            stopped = prompt.stopped or prompt.tokens[-1] in self._end_tokens
            yield Continuation(prompt.prompt.key, prompt.tokens, "stop" if stopped else "length")


def slot_length(prompt_tokens: int, new_tokens: int) -> int:
    """Returns the slot length of a prompt and its answer; one position after the end is written too."""
    return prompt_tokens + new_tokens + 1
