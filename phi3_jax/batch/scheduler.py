"""Decides which slot does what next. Plain Python, which knows lengths and slots but no models or devices.

Slots come in pools; all slots of a pool have the same length, in tokens. All slots decode together. A prompt
goes to the pool with the shortest slots that hold it and its answer.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from phi3_jax.errors import UserError


@dataclass(frozen=True)
class Job:
    """A prompt that waits for a slot or has one."""

    number: int
    """Identifies the job."""
    tokens: int
    """The tokens to prefill before it can decode."""
    length: int
    """The slot length that the prompt and its answer need."""
    prefix_length: int = 0
    """The tokens of its shared prefix, which is already computed; `tokens` does not count them."""


@dataclass(frozen=True)
class PoolSize:
    """The number and the length of a pool's slots."""

    slots: int
    length: int


@dataclass(frozen=True)
class Prefill:
    """Compute up to `width` tokens of a prompt, or all tokens of several short prompts."""

    pool: int
    slots: tuple[int, ...]
    jobs: tuple[Job, ...]
    start: int
    """The tokens of each job that are already computed."""
    width: int
    last: bool
    """No tokens remain after these: the jobs can decode."""
    grouped: bool = False
    """The jobs form a group, which may have one job only."""


@dataclass(frozen=True)
class Decode:
    """Generate some tokens in every running slot."""


@dataclass
class _Pool:
    length: int
    free: list[int]
    """The free slots; the last one is used next."""
    running: dict[int, Job] = field(default_factory=dict)
    prefilling: set[int] = field(default_factory=set)


class Scheduler:
    """Returns one action after another; the caller executes it, then reports the result.

    A free slot goes to the first waiting job that can have it, so that no job waits for ever; short prompts
    that came later may be prefilled together with it. A job takes a slot of a larger pool only while no
    waiting job needs that pool. Between two decodes of running slots, prefills stop once they have computed
    `budget` tokens, so that long prompts do not delay the answers of others.

    Args:
        pools: in ascending order of length.
        chunk: the tokens of one prompt that are prefilled at a time.
        groups: (prompts, tokens of each) that are prefilled together. With its shared prefix, a prompt of a
            group has no more tokens than a chunk.
        budget: the tokens to prefill between two decodes.

    Raises:
        UserError: there are no pools, or they are not in order.
    """

    def __init__(
        self,
        pools: Sequence[PoolSize],
        *,
        chunk: int,
        groups: Sequence[tuple[int, int]] = (),
        budget: int,
    ):
        lengths = [pool.length for pool in pools]
        if not pools or lengths != sorted(set(lengths)) or min(pool.slots for pool in pools) < 1:
            raise UserError(
                f"pools={list(pools)}: expected at least one, each with slots, in order of length"
            )
        self._pools = [_Pool(pool.length, list(range(pool.slots))[::-1]) for pool in pools]
        self._chunk, self._budget = chunk, budget
        self._groups = sorted(groups, key=lambda group: group[1])
        self._waiting: deque[Job] = deque()
        self._recomputations: deque[tuple[int, int, Job]] = deque()
        """Jobs that are computed again in their slot: (pool, slot, job)."""
        self._current: tuple[int, int, Job, int] | None = None
        """The prompt that is prefilled in chunks: (pool, slot, job, computed tokens)."""
        self._prefilled = 0

    @property
    def waiting(self) -> int:
        """The number of jobs without a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """The number of slots that have a job."""
        return sum(len(pool.running) + len(pool.prefilling) for pool in self._pools)

    @property
    def idle(self) -> bool:
        """Whether every job is finished."""
        return not self._waiting and not self.busy

    def running(self, pool: int) -> dict[int, Job]:
        """Returns the jobs of a pool that decode, by slot."""
        return dict(self._pools[pool].running)

    def add(self, job: Job) -> None:
        """Adds a job after all others.

        Raises:
            UserError: the job is longer than every slot.
        """
        longest = self._pools[-1].length
        if job.length > longest:
            raise UserError(f"the job needs a slot of length {job.length}; the longest has length {longest}")
        self._waiting.append(job)

    def next(self) -> Prefill | Decode | None:
        """Returns the next action; None: there is nothing to do until more jobs are added."""
        can_decode = any(pool.running for pool in self._pools)
        if not can_decode or self._prefilled < self._budget:
            prefill = self._next_prefill()
            if prefill is not None:
                self._prefilled += len(prefill.slots) * prefill.width
                return prefill
        if not can_decode:
            return None
        self._prefilled = 0
        return Decode()

    def finish(self, pool: int, slots: Collection[int]) -> None:
        """Frees slots whose jobs are finished."""
        for slot in slots:
            del self._pools[pool].running[slot]
            self._pools[pool].free.append(slot)

    def recompute(self, pool: int, slot: int, tokens: int) -> None:
        """Schedules `tokens` of a running job to be prefilled again before it decodes further."""
        job = self._pools[pool].running.pop(slot)
        self._pools[pool].prefilling.add(slot)
        self._recomputations.append((pool, slot, Job(job.number, tokens, job.length)))

    def _next_prefill(self) -> Prefill | None:
        if self._current is None and self._recomputations:
            self._current = (*self._recomputations.popleft(), 0)
        if self._current is None:
            start = self._start()
            if start is None or isinstance(start, Prefill):
                return start
            self._current = (*start, 0)
        pool, slot, job, computed = self._current
        width = min(self._chunk, job.tokens - computed)
        last = computed + width == job.tokens
        self._current = None if last else (pool, slot, job, computed + width)
        if last:
            self._run(pool, slot, job)
        return Prefill(pool, (slot,), (job,), computed, width, last)

    def _start(self) -> Prefill | tuple[int, int, Job] | None:
        """Gives a slot to the first job that can have one, and to others that form a group with it."""
        first = next(self._startable(), None)
        if first is None:
            return None
        pool, job = first
        group = next((group for group in self._groups if self._fits(job, group[1])), None)
        if group is None:
            self._waiting.remove(job)
            return pool, self._take(pool), job
        count, width = group
        jobs = [other for index, other in self._startable() if index == pool and self._fits(other, width)]
        jobs = jobs[: min(count, len(self._pools[pool].free))]
        slots = []
        for other in jobs:
            self._waiting.remove(other)
            slots.append(self._take(pool))
            self._run(pool, slots[-1], other)
        return Prefill(pool, tuple(slots), tuple(jobs), 0, width, last=True, grouped=True)

    def _fits(self, job: Job, width: int) -> bool:
        """Returns whether a job can be in a group of prompts of `width` tokens."""
        return job.tokens <= width and job.prefix_length + width <= self._chunk

    def _startable(self) -> Iterator[tuple[int, Job]]:
        """Yields the waiting jobs that could have a slot now, each with its pool, in order of arrival."""
        smallest = [self._smallest_pool(job) for job in self._waiting]
        for job, own in zip(self._waiting, smallest, strict=True):
            for index in range(own, len(self._pools)):
                if self._pools[index].free and (index == own or index not in smallest):
                    yield index, job
                    break

    def _smallest_pool(self, job: Job) -> int:
        return next(index for index, pool in enumerate(self._pools) if job.length <= pool.length)

    def _take(self, pool: int) -> int:
        slot = self._pools[pool].free.pop()
        self._pools[pool].prefilling.add(slot)
        return slot

    def _run(self, pool: int, slot: int, job: Job) -> None:
        self._pools[pool].prefilling.discard(slot)
        self._pools[pool].running[slot] = job
