"""The scheduler against a machine that only counts."""

import random
from collections.abc import Iterable

import pytest

from phi3_jax.batch.scheduler import Decode, Fill, Job, PoolSize, Scheduler

CHUNK, BUDGET = 64, 128
GROUPS = ((4, 16), (2, 32))
POOLS = (PoolSize(3, 128), PoolSize(2, 512))


class Machine:
    """Does what it is told, and sees that it can be done; a job makes as many tokens as `answers` says.

    Attributes:
        begun: numbers of jobs in the order of their first action; ended: likewise of their last.
        waited: actions from a job's arrival to its begin.
    """

    def __init__(self, scheduler: Scheduler, pools: Iterable[PoolSize], *, stale: float = 0.0, seed: int = 0):
        self.scheduler, self.pools = scheduler, list(pools)
        self.stale, self.draws = stale, random.Random(seed)
        self.answers: dict[int, int] = {}
        self.computed: dict[tuple[int, int], tuple[Job, int]] = {}
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.arrived: dict[int, int] = {}
        self.waited: dict[int, int] = {}
        self.actions = 0
        self.filled = 0

    def add(self, job: Job, answer: int) -> None:
        self.answers[job.number] = answer
        self.arrived[job.number] = self.actions
        self.scheduler.add(job)

    def step(self) -> bool:
        running = any(self.scheduler.running(pool) for pool in range(len(self.pools)))
        action = self.scheduler.next()
        self.actions += 1
        if action is None:
            assert self.scheduler.idle
            return False
        if isinstance(action, Fill):
            self.fill(action, running)
        else:
            self.decode()
        return True

    def fill(self, fill: Fill, running: bool) -> None:
        size = self.pools[fill.pool]
        assert len(fill.slots) == len(set(fill.slots)) == len(fill.jobs) > 0
        assert max(fill.slots) < size.slots
        if len(fill.slots) > 1 or not fill.last or fill.start:
            assert fill.width <= CHUNK
        for slot, job in zip(fill.slots, fill.jobs, strict=True):
            assert job.columns <= size.columns
            before, done = self.computed.get((fill.pool, slot), (job, 0))
            assert before == job  # nobody else has the slot
            assert done == fill.start
            if job.number not in self.begun:
                self.begun.append(job.number)
                self.waited[job.number] = self.actions - self.arrived[job.number]
            done = min(done + fill.width, job.tokens)
            self.computed[fill.pool, slot] = job, done
            assert fill.last == (done == job.tokens)
            assert (slot in self.scheduler.running(fill.pool)) == fill.last
        if running:
            assert self.filled < BUDGET
            self.filled += fill.width * len(fill.slots)

    def decode(self) -> None:
        self.filled = 0
        assert any(self.scheduler.running(pool) for pool in range(len(self.pools)))
        for pool in range(len(self.pools)):
            ended = []
            for slot, job in self.scheduler.running(pool).items():
                held, done = self.computed[pool, slot]
                assert (held, done) == (job, job.tokens)
                self.answers[job.number] -= 1
                if self.answers[job.number] == 0:
                    ended.append(slot)
                    self.ended.append(job.number)
                    del self.computed[pool, slot]
                elif self.draws.random() < self.stale:
                    tokens = job.tokens + 1
                    self.scheduler.fill_again(pool, slot, tokens)
                    self.computed[pool, slot] = Job(job.number, tokens, job.columns), 0
            self.scheduler.ended(pool, ended)

    def run(self) -> None:
        while self.step():
            pass


def make(pools: tuple[PoolSize, ...] = POOLS, **options: float) -> Machine:
    scheduler = Scheduler(pools, chunk=CHUNK, groups=GROUPS, budget=BUDGET)
    return Machine(scheduler, pools, **options)


@pytest.mark.parametrize("seed", range(20))
def test_every_job_ends_once_and_every_slot_is_free_again(seed: int) -> None:
    draws = random.Random(seed)
    machine = make(stale=0.02 if seed % 2 else 0.0, seed=seed)
    for number in range(200):
        tokens = int(2 ** draws.uniform(0, 8.5))
        machine.add(Job(number, tokens, tokens + draws.randrange(1, 100)), draws.randrange(1, 60))
        for _ in range(draws.randrange(6)):  # some come while others are under way
            machine.step()
    machine.run()
    assert sorted(machine.ended) == list(range(200))
    assert machine.scheduler.busy == machine.scheduler.waiting == 0
    assert not machine.computed
    machine.add(Job(200, 3, 9), 1)  # and it goes on
    machine.run()
    assert machine.ended[-1] == 200


def test_long_prompts_are_begun_in_their_order() -> None:
    machine = make()
    for number in range(30):
        machine.add(Job(number, 40 + number, 128), 1 + number % 7)
    machine.run()
    assert machine.begun == sorted(machine.begun)


def test_short_prompts_are_computed_together() -> None:
    machine = make((PoolSize(6, 128),))
    for number in range(5):
        machine.add(Job(number, 5 + number, 64), 3)
    machine.add(Job(5, 30, 64), 3)
    first = machine.scheduler.next()
    assert isinstance(first, Fill)
    assert [job.number for job in first.jobs] == [0, 1, 2, 3]
    assert (first.width, first.last, len(set(first.slots))) == (16, True, 4)
    second = machine.scheduler.next()
    assert isinstance(second, Fill)
    assert [job.number for job in second.jobs] == [4]  # 5 does not go in 16 tokens
    assert second.width == 16


def test_a_group_has_no_more_than_a_chunk_with_what_is_shared() -> None:
    machine = make((PoolSize(6, 256),))
    for number, shared in enumerate((CHUNK - 32, CHUNK - 16, CHUNK, 0)):
        machine.add(Job(number, 9, 128, shared), 3)
    fills = [machine.scheduler.next(), machine.scheduler.next()]
    assert all(isinstance(fill, Fill) for fill in fills)
    found = [([job.number for job in fill.jobs], fill.together) for fill in fills if isinstance(fill, Fill)]
    assert found == [([0, 1, 3], True), ([2], False)]


def test_a_long_prompt_lets_others_go_on() -> None:
    machine = make((PoolSize(2, 1024),))
    machine.add(Job(0, 3, 64), 50)
    machine.step()
    machine.add(Job(1, 900, 1000), 1)
    kinds = [type(machine.scheduler.next()) for _ in range(30)]
    between = "".join("D" if kind is Decode else "f" for kind in kinds).split("D")
    assert max(map(len, between)) == BUDGET // CHUNK
    assert sum(map(len, between)) == -(-900 // CHUNK)


def test_a_stream_of_small_jobs_does_not_keep_a_large_one_waiting() -> None:
    machine = make()
    large = number = 40
    for small in range(large):
        machine.add(Job(small, 8, 32), 5)
    for _ in range(3):
        machine.step()
    assert len(machine.scheduler.running(1)) == 2  # nobody needs the larger pool yet
    machine.add(Job(large, 300, 400), 2)
    for _ in range(300):
        number += 1
        machine.add(Job(number, 8, 32), 5)
        machine.step()
    assert machine.waited[large] < 40
    machine.run()
    assert sorted(machine.ended) == list(range(number + 1))


def test_a_small_job_leaves_a_larger_slot_to_the_job_that_needs_it() -> None:
    machine = make((PoolSize(1, 64), PoolSize(1, 512)))
    machine.add(Job(0, 40, 50), 20)
    machine.add(Job(1, 40, 50), 20)
    machine.add(Job(2, 300, 400), 1)
    machine.step()
    machine.step()
    assert machine.begun == [0, 2]


def test_jobs_that_no_slot_holds() -> None:
    machine = make()
    with pytest.raises(ValueError, match="513 columns are more than the 512 of any slot"):
        machine.add(Job(0, 400, 513), 1)
    assert machine.scheduler.idle


@pytest.mark.parametrize("pools", [(), (PoolSize(1, 64), PoolSize(1, 64)), (PoolSize(0, 64),)])
def test_pools_that_cannot_be(pools: tuple[PoolSize, ...]) -> None:
    with pytest.raises(ValueError, match="expected some, with slots, and more columns each"):
        Scheduler(pools, chunk=CHUNK, budget=BUDGET)
