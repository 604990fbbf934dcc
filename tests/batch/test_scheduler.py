"""The scheduler with a machine that only counts tokens."""

import random
from collections.abc import Iterable

import pytest

from phi3_jax.batch.scheduler import Decode, Job, PoolSize, Prefill, Scheduler
from phi3_jax.sizes import ceil_div

CHUNK, BUDGET = 64, 128
GROUPS = ((4, 16), (2, 32))
POOLS = (PoolSize(3, 128), PoolSize(2, 512))


class Machine:
    """Executes actions and checks that they are possible; `answers` has the tokens that a job generates.

    Attributes:
        started: the numbers of jobs in the order of their first action.
        finished: the numbers of jobs in the order of their last action.
        waited: the actions between a job's arrival and its first action.
    """

    def __init__(
        self, scheduler: Scheduler, pools: Iterable[PoolSize], *, recompute: float = 0.0, seed: int = 0
    ):
        self.scheduler, self.pools = scheduler, list(pools)
        self.recompute, self.draws = recompute, random.Random(seed)
        self.answers: dict[int, int] = {}
        self.computed: dict[tuple[int, int], tuple[Job, int]] = {}
        self.started: list[int] = []
        self.finished: list[int] = []
        self.arrived: dict[int, int] = {}
        self.waited: dict[int, int] = {}
        self.actions = 0
        self.prefilled = 0

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
        if isinstance(action, Prefill):
            self.prefill(action, running)
        else:
            self.decode()
        return True

    def prefill(self, action: Prefill, running: bool) -> None:
        size = self.pools[action.pool]
        assert len(action.slots) == len(set(action.slots)) == len(action.jobs) > 0
        assert max(action.slots) < size.slots
        if len(action.slots) > 1 or not action.last or action.start:
            assert action.width <= CHUNK
        for slot, job in zip(action.slots, action.jobs, strict=True):
            assert job.length <= size.length
            before, done = self.computed.get((action.pool, slot), (job, 0))
            assert before == job  # no other job has the slot
            assert done == action.start
            if job.number not in self.started:
                self.started.append(job.number)
                self.waited[job.number] = self.actions - self.arrived[job.number]
            done = min(done + action.width, job.tokens)
            self.computed[action.pool, slot] = job, done
            assert action.last == (done == job.tokens)
            assert (slot in self.scheduler.running(action.pool)) == action.last
        if running:
            assert self.prefilled < BUDGET
            self.prefilled += action.width * len(action.slots)

    def decode(self) -> None:
        self.prefilled = 0
        assert any(self.scheduler.running(pool) for pool in range(len(self.pools)))
        for pool in range(len(self.pools)):
            finished = []
            for slot, job in self.scheduler.running(pool).items():
                held, done = self.computed[pool, slot]
                assert (held, done) == (job, job.tokens)
                self.answers[job.number] -= 1
                if self.answers[job.number] == 0:
                    finished.append(slot)
                    self.finished.append(job.number)
                    del self.computed[pool, slot]
                elif self.draws.random() < self.recompute:
                    tokens = job.tokens + 1
                    self.scheduler.recompute(pool, slot, tokens)
                    self.computed[pool, slot] = Job(job.number, tokens, job.length), 0
            self.scheduler.finish(pool, finished)

    def run(self) -> None:
        while self.step():
            pass


def make(pools: tuple[PoolSize, ...] = POOLS, **options: float) -> Machine:
    scheduler = Scheduler(pools, chunk=CHUNK, groups=GROUPS, budget=BUDGET)
    return Machine(scheduler, pools, **options)


@pytest.mark.parametrize("seed", range(20))
def test_finishes_every_job_once_and_frees_every_slot(seed: int) -> None:
    draws = random.Random(seed)
    machine = make(recompute=0.02 if seed % 2 else 0.0, seed=seed)
    for number in range(200):
        tokens = int(2 ** draws.uniform(0, 8.5))
        machine.add(Job(number, tokens, tokens + draws.randrange(1, 100)), draws.randrange(1, 60))
        for _ in range(draws.randrange(6)):  # some jobs arrive while others run
            machine.step()
    machine.run()
    assert sorted(machine.finished) == list(range(200))
    assert machine.scheduler.busy == machine.scheduler.waiting == 0
    assert not machine.computed
    machine.add(Job(200, 3, 9), 1)  # it accepts more jobs
    machine.run()
    assert machine.finished[-1] == 200


def test_starts_long_prompts_in_order() -> None:
    machine = make()
    for number in range(30):
        machine.add(Job(number, 40 + number, 128), 1 + number % 7)
    machine.run()
    assert machine.started == sorted(machine.started)


def test_prefills_short_prompts_together() -> None:
    machine = make((PoolSize(6, 128),))
    for number in range(5):
        machine.add(Job(number, 5 + number, 64), 3)
    machine.add(Job(5, 30, 64), 3)
    first = machine.scheduler.next()
    assert isinstance(first, Prefill)
    assert [job.number for job in first.jobs] == [0, 1, 2, 3]
    assert (first.width, first.last, len(set(first.slots))) == (16, True, 4)
    second = machine.scheduler.next()
    assert isinstance(second, Prefill)
    assert [job.number for job in second.jobs] == [4]  # job 5 has more than 16 tokens
    assert second.width == 16


def test_a_group_with_its_prefixes_fits_a_chunk() -> None:
    machine = make((PoolSize(6, 256),))
    for number, prefix_length in enumerate((CHUNK - 32, CHUNK - 16, CHUNK, 0)):
        machine.add(Job(number, 9, 128, prefix_length), 3)
    actions = [machine.scheduler.next(), machine.scheduler.next()]
    assert all(isinstance(each, Prefill) for each in actions)
    groups = [
        ([job.number for job in each.jobs], each.grouped) for each in actions if isinstance(each, Prefill)
    ]
    assert groups == [([0, 1, 3], True), ([2], False)]


def test_decodes_between_the_chunks_of_a_long_prompt() -> None:
    machine = make((PoolSize(2, 1024),))
    machine.add(Job(0, 3, 64), 50)
    machine.step()
    machine.add(Job(1, 900, 1000), 1)
    kinds = [type(machine.scheduler.next()) for _ in range(30)]
    between = "".join("D" if kind is Decode else "f" for kind in kinds).split("D")
    assert max(map(len, between)) == BUDGET // CHUNK
    assert sum(map(len, between)) == ceil_div(900, CHUNK)


def test_many_small_jobs_do_not_delay_a_large_one() -> None:
    machine = make()
    large = number = 40
    for small in range(large):
        machine.add(Job(small, 8, 32), 5)
    for _ in range(3):
        machine.step()
    assert len(machine.scheduler.running(1)) == 2  # no job needs the larger pool yet
    machine.add(Job(large, 300, 400), 2)
    for _ in range(300):
        number += 1
        machine.add(Job(number, 8, 32), 5)
        machine.step()
    assert machine.waited[large] < 40
    machine.run()
    assert sorted(machine.finished) == list(range(number + 1))


def test_keeps_a_larger_slot_for_the_job_that_needs_it() -> None:
    machine = make((PoolSize(1, 64), PoolSize(1, 512)))
    machine.add(Job(0, 40, 50), 20)
    machine.add(Job(1, 40, 50), 20)
    machine.add(Job(2, 300, 400), 1)
    machine.step()
    machine.step()
    assert machine.started == [0, 2]


def test_rejects_jobs_longer_than_every_slot() -> None:
    machine = make()
    with pytest.raises(ValueError, match="needs a slot of length 513; the longest has length 512"):
        machine.add(Job(0, 400, 513), 1)
    assert machine.scheduler.idle


@pytest.mark.parametrize("pools", [(), (PoolSize(1, 64), PoolSize(1, 64)), (PoolSize(0, 64),)])
def test_rejects_invalid_pools(pools: tuple[PoolSize, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one, each with slots, in order of length"):
        Scheduler(pools, chunk=CHUNK, budget=BUDGET)
