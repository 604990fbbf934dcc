"""Continuous batching: prompts of any length through slots that are filled again as soon as they are free."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.prefixes import Prefixes
from phi3_jax.batch.scheduler import Decode, Fill, Job, PoolSize, Scheduler
from phi3_jax.batch.slots import Slots
from phi3_jax.batch.stages import Row
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel

CHUNK = 512
WIDTHS = (128, 256, CHUNK)
"""Tokens of one prompt that are computed at a time; the last ones of it may be few."""

GROUPS = ((8, 32), (4, 128))
"""Prompts, and tokens of each, that are computed together: alone, short ones leave the machine half idle."""

BUDGET = 4 * CHUNK
"""Tokens of prompts between two dispatches of those that make tokens."""


T = TypeVar("T")


class Prompt(NamedTuple):
    """What to continue."""

    key: Any
    """By which the caller knows the answer."""
    ids: Sequence[int]
    max_new_tokens: int
    options: RowOptions = RowOptions()
    stops: Callable[[Sequence[int]], bool] | None = None
    """Whether the answer ends behind the last of these tokens of prompt and answer; end tokens apart."""


class Continuation(NamedTuple):
    """A prompt's answer."""

    key: Any
    tokens: list[int]
    """An end token included."""
    finish_reason: str
    """ "stop": an end token, or what `stops` said; "length": `max_new_tokens` are made."""


@dataclass(frozen=True)
class Load:
    """How much of the slots is in use."""

    busy: int
    slots: int
    prompt_tokens: int
    """That were to be computed so far; those that are shared count once, those computed again twice."""


@dataclass
class _Active:
    prompt: Prompt
    shared: int
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    """By `stops`."""

    def row(self) -> Row:
        prompt = self.prompt
        ids = [*prompt.ids, *self.tokens]
        return Row(ids, len(self.tokens), prompt.max_new_tokens, prompt.options, self.shared)

    def take(self, tokens: Sequence[int]) -> None:
        """Adds tokens until the prompt's `stops` says that one is the last."""
        stops = self.prompt.stops
        for token in tokens:
            self.tokens.append(token)
            if stops is not None and stops([*self.prompt.ids, *self.tokens]):
                self.stopped = True
                return


class ContinuousBatch:
    """Prompts in, answers out as they finish, through a fixed set of compiled programs.

    Args:
        compiled: the model.
        pools: slots by their size.
        end_tokens: any of which ends an answer.
        widths: tokens of one prompt that are computed at a time; groups, budget: as `Scheduler` has them.
        prefixes: finds what prompts share; None computes every prompt by itself.

    Raises:
        ValueError: pools that cannot be.
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
        prefixes: Prefixes | None = None,
    ):
        self._new_scheduler = partial(Scheduler, pools, chunk=max(widths), groups=groups, budget=budget)
        self._scheduler = self._new_scheduler()
        self._prefixes = prefixes
        self._longest = max(pool.columns for pool in pools)
        self._on_device = Slots(compiled, pools, groups=groups, widths=widths, end_tokens=end_tokens)
        self._pools = range(len(pools))
        self._end_tokens = frozenset(end_tokens)
        self._slots = sum(pool.slots for pool in pools)
        self._prompt_tokens = 0

    @property
    def load(self) -> Load:
        """How much of the slots is in use now."""
        computed = self._prompt_tokens + self._on_device.beginnings.computed
        return Load(self._scheduler.busy, self._slots, computed)

    def run(self, prompts: Iterable[Prompt | T]) -> Iterator[Continuation | T]:
        """Answers in the order in which they finish; prompts are taken as slots come free.

        Whatever else stands among the prompts is given back when its turn comes. One run at a time; one that
        is given up leaves the slots free.

        Raises:
            ValueError: a prompt without tokens, or one that no slot holds together with its answer.
        """
        active: dict[int, _Active] = {}
        try:
            yield from self._run(enumerate(prompts), active)
        finally:
            if active:
                self._scheduler = self._new_scheduler()
                self._on_device.retire()

    def _run(
        self, coming: Iterator[tuple[int, Prompt | T]], active: dict[int, _Active]
    ) -> Iterator[Continuation | T]:
        more = True
        while more or not self._scheduler.idle:
            while more and self._scheduler.waiting < self._slots:
                number, prompt = next(coming, (None, None))
                if number is None or prompt is None:
                    more = False
                elif isinstance(prompt, Prompt):
                    self._add(number, prompt, active)
                else:
                    yield prompt
            action = self._scheduler.next()
            if isinstance(action, Fill):
                rows = [active[job.number].row() for job in action.jobs]
                self._on_device.fill(
                    action.pool,
                    action.slots,
                    rows,
                    action.start,
                    action.width,
                    together=action.together,
                    last=action.last,
                )
            elif isinstance(action, Decode):
                yield from self._decode(active)

    def _add(self, number: int, prompt: Prompt, active: dict[int, _Active]) -> None:
        if not len(prompt.ids) or prompt.max_new_tokens < 1:
            raise UserError(f"prompt {prompt.key!r} has no tokens, or is to have no answer")
        columns = columns_of(len(prompt.ids), prompt.max_new_tokens)
        if columns > self._longest:
            raise UserError(
                f"prompt {prompt.key!r} has {len(prompt.ids)} tokens and may get {prompt.max_new_tokens}: "
                f"slots hold {self._longest - 1}"
            )
        shared = 0 if self._prefixes is None else self._prefixes.shared(prompt.ids)
        self._scheduler.add(Job(number, max(len(prompt.ids) - 1 - shared, 1), columns, shared))
        active[number] = _Active(prompt, shared)
        self._prompt_tokens += len(prompt.ids) - shared

    def _decode(self, active: dict[int, _Active]) -> Iterator[Continuation]:
        made = self._on_device.decode()
        paused: list[int] = []
        done: list[_Active] = []
        for pool in self._pools:
            ended: list[int] = []
            for slot, job in self._scheduler.running(pool).items():
                number, row = self._on_device.number(pool, slot), active[job.number]
                tokens = made.tokens[:, number]
                row.take(np.extract(tokens >= 0, tokens).tolist())
                if row.stopped or made.finished[number]:
                    ended.append(slot)
                    done.append(active.pop(job.number))
                elif made.stale[number]:
                    row.shared = 0
                    again = len(row.row().ids) - 1
                    self._prompt_tokens += again
                    self._scheduler.fill_again(pool, slot, again)
                else:
                    continue
                paused.append(number)
            self._scheduler.ended(pool, ended)
        if paused:  # so that the others can go on
            self._on_device.retire(paused)
        for row in done:
            stopped = row.stopped or row.tokens[-1] in self._end_tokens
            yield Continuation(row.prompt.key, row.tokens, "stop" if stopped else "length")


def columns_of(prompt_tokens: int, new_tokens: int) -> int:
    """That a slot must have: one is written behind an answer's end."""
    return prompt_tokens + new_tokens + 1
