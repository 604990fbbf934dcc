"""Which slot does what next, in plain Python: knows lengths and slots, nothing of models or devices.

Slots come in pools: those of a pool have the same number of columns (places for tokens). All make tokens
together. A prompt goes to the pool with the fewest columns that hold it and its answer.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from phi3_jax.errors import UserError


@dataclass(frozen=True)
class Job:
    """A prompt that waits for a slot, or is in one."""

    number: int
    """Its name; jobs are numbered in the order in which they came."""
    tokens: int
    """That must be computed before it can make one."""
    columns: int
    """That it needs from beginning to end."""
    shared: int = 0
    """Tokens before those, which are computed already: other prompts have them too."""


@dataclass(frozen=True)
class PoolSize:
    """A pool to be made."""

    slots: int
    columns: int


@dataclass(frozen=True)
class Fill:
    """Compute the next `width` tokens, at most, of one prompt or of several short ones."""

    pool: int
    slots: tuple[int, ...]
    jobs: tuple[Job, ...]
    start: int
    """Tokens of each that are computed already."""
    width: int
    last: bool
    """Nothing is left behind it: they make tokens from now on."""
    together: bool = False
    """These are prompts of a group, be it of one."""


@dataclass(frozen=True)
class Decode:
    """Let every running slot make some tokens."""


@dataclass
class _Pool:
    columns: int
    free: list[int]
    """Slots that nobody has, the next one last."""
    running: dict[int, Job] = field(default_factory=dict)
    filling: set[int] = field(default_factory=set)


class Scheduler:
    """Gives one action after another; the caller does it, then says what came of it.

    A slot goes to the first waiting job that it is for, so that none waits for ever; short prompts that came
    later may begin together with it. A job takes a slot of a larger pool only while no waiting job needs one
    of that. Between two decodes of running slots at most `budget` tokens are filled, and what one action
    fills: long prompts do not hold up the answers of others.

    Args:
        pools: with more columns from one to the next.
        chunk: tokens of one prompt that are computed at a time.
        groups: (prompts, tokens of each) that are computed together; a group's prompts have no more, and no
            more than a chunk with those that they share.
        budget: tokens filled between two decodes.

    Raises:
        ValueError: no pools, or pools that are not in order.
    """

    def __init__(
        self,
        pools: Sequence[PoolSize],
        *,
        chunk: int,
        groups: Sequence[tuple[int, int]] = (),
        budget: int,
    ):
        columns = [pool.columns for pool in pools]
        if not pools or columns != sorted(set(columns)) or min(pool.slots for pool in pools) < 1:
            raise UserError(f"pools={list(pools)}: expected some, with slots, and more columns each")
        self._pools = [_Pool(pool.columns, list(range(pool.slots))[::-1]) for pool in pools]
        self._chunk, self._budget = chunk, budget
        self._groups = sorted(groups, key=lambda group: group[1])
        self._waiting: deque[Job] = deque()
        self._again: deque[tuple[int, int, Job]] = deque()
        """Jobs that are computed anew in the slot that they have: (pool, slot, job)."""
        self._begun: tuple[int, int, Job, int] | None = None
        """A prompt whose chunks are under way, and how many of its tokens are computed."""
        self._filled = 0

    @property
    def waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Slots that have a job."""
        return sum(len(pool.running) + len(pool.filling) for pool in self._pools)

    @property
    def idle(self) -> bool:
        """Whether every job has ended."""
        return not self._waiting and not self.busy

    def running(self, pool: int) -> dict[int, Job]:
        """The jobs that make tokens, by slot."""
        return dict(self._pools[pool].running)

    def add(self, job: Job) -> None:
        """A job that waits behind the others.

        Raises:
            ValueError: no pool has so many columns.
        """
        if job.columns > self._pools[-1].columns:
            raise UserError(f"{job.columns} columns are more than the {self._pools[-1].columns} of any slot")
        self._waiting.append(job)

    def next(self) -> Fill | Decode | None:
        """What to do now; None: nothing, until more jobs are added."""
        decodable = any(pool.running for pool in self._pools)
        if not decodable or self._filled < self._budget:
            fill = self._next_fill()
            if fill is not None:
                self._filled += len(fill.slots) * fill.width
                return fill
        if not decodable:
            return None
        self._filled = 0
        return Decode()

    def ended(self, pool: int, slots: Collection[int]) -> None:
        """These slots' jobs are done: the slots are free."""
        for slot in slots:
            del self._pools[pool].running[slot]
            self._pools[pool].free.append(slot)

    def fill_again(self, pool: int, slot: int, tokens: int) -> None:
        """A running job must be computed anew, `tokens` of it, before it makes another token."""
        job = self._pools[pool].running.pop(slot)
        self._pools[pool].filling.add(slot)
        self._again.append((pool, slot, Job(job.number, tokens, job.columns)))

    def _next_fill(self) -> Fill | None:
        if self._begun is None and self._again:
            self._begun = (*self._again.popleft(), 0)
        if self._begun is None:
            started = self._start()
            if isinstance(started, Fill):
                return started
            if started is None:
                return None
            self._begun = (*started, 0)
        pool, slot, job, done = self._begun
        width = min(self._chunk, job.tokens - done)
        last = done + width == job.tokens
        self._begun = None if last else (pool, slot, job, done + width)
        if last:
            self._run(pool, slot, job)
        return Fill(pool, (slot,), (job,), done, width, last)

    def _start(self) -> Fill | tuple[int, int, Job] | None:
        """Slots for the first job that can have one, and for others that are computed together with it."""
        first = next(self._startable(), None)
        if first is None:
            return None
        pool, job = first
        width = next((width for _, width in self._groups if self._fits(job, width)), None)
        if width is None:
            self._waiting.remove(job)
            return pool, self._take(pool), job
        most = next(prompts for prompts, other in self._groups if other == width)
        together = [other for where, other in self._startable() if where == pool and self._fits(other, width)]
        together = together[: min(most, len(self._pools[pool].free))]
        slots = []
        for other in together:
            self._waiting.remove(other)
            slots.append(self._take(pool))
            self._run(pool, slots[-1], other)
        return Fill(pool, tuple(slots), tuple(together), 0, width, last=True, together=True)

    def _fits(self, job: Job, width: int) -> bool:
        """Whether it can be one of a group."""
        return job.tokens <= width and job.shared + width <= self._chunk

    def _startable(self) -> Iterator[tuple[int, Job]]:
        """Waiting jobs, each with the pool that it could have a slot of now, first come first."""
        own = [self._pool_for(job) for job in self._waiting]
        for job, smallest in zip(self._waiting, own, strict=True):
            for index in range(smallest, len(self._pools)):
                if self._pools[index].free and (index == smallest or index not in own):
                    yield index, job
                    break

    def _pool_for(self, job: Job) -> int:
        """The pool with the fewest columns that hold it."""
        return next(index for index, pool in enumerate(self._pools) if job.columns <= pool.columns)

    def _take(self, pool: int) -> int:
        slot = self._pools[pool].free.pop()
        self._pools[pool].filling.add(slot)
        return slot

    def _run(self, pool: int, slot: int, job: Job) -> None:
        self._pools[pool].filling.discard(slot)
        self._pools[pool].running[slot] = job
