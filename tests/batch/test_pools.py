"""Pools fit the memory, the number of slots and the requests."""

import random

import pytest

from phi3_jax.batch.pools import MIN_LENGTH, choose_pools, holds
from phi3_jax.batch.scheduler import PoolSize


@pytest.mark.parametrize("seed", range(50))
def test_pools_respect_all_limits(seed: int) -> None:
    draws = random.Random(seed)
    length = draws.choice([40, 300, 2049, 8193, 131073])
    slots, multiple, complete = draws.randrange(1, 100), draws.choice([1, 1, 2, 4]), draws.random() < 0.5
    capacity = length * multiple * draws.randrange(1, 50)
    needs = []
    for _ in range(draws.randrange(0, 300)):
        need = min(int(2 ** draws.uniform(2, 18)), length)
        needs.append((need, draws.randrange(1, need)))
    pools = choose_pools(
        needs, slots=slots, length=length, capacity=capacity, multiple=multiple, complete=complete
    )
    assert [pool.length for pool in pools] == sorted({pool.length for pool in pools})
    assert pools[-1].length == length
    assert all(pool.slots >= 1 and pool.slots % multiple == 0 for pool in pools)
    assert sum(pool.slots for pool in pools) <= max(slots, multiple)
    assert sum(pool.slots * pool.length for pool in pools) <= capacity


def test_short_requests_get_short_slots() -> None:
    needs = [(100, 50)] * 90 + [(1900, 50)] * 10
    short, long = choose_pools(needs, slots=40, length=2000, capacity=10**6)
    assert (short, long) == (PoolSize(36, MIN_LENGTH), PoolSize(4, 2000))


def test_keeps_a_slot_for_the_longest_requests() -> None:
    assert choose_pools([(100, 50)] * 90, slots=8, length=8193, capacity=10**6)[-1] == PoolSize(1, 8193)
    assert choose_pools([], slots=8, length=513, capacity=10**6) == [PoolSize(8, 513)]


def test_few_requests_get_few_slots() -> None:
    needs = [(100, 90)] * 3 + [(1900, 500)] * 5
    pools = choose_pools(needs, slots=48, length=2000, capacity=10**6, complete=True)
    assert pools == [PoolSize(4, MIN_LENGTH), PoolSize(8, 2000)]
    pools = choose_pools(needs, slots=48, length=2000, capacity=10**6, complete=True, multiple=4)
    assert pools == [PoolSize(4, MIN_LENGTH), PoolSize(8, 2000)]
    assert sum(pool.slots for pool in choose_pools(needs, slots=48, length=2000, capacity=10**6)) == 48
    pools = choose_pools(needs, slots=8, length=2000, capacity=10**6, complete=True)
    assert sum(pool.slots for pool in pools) == 8


def test_pools_hold_others_with_slots_as_many_and_as_long() -> None:
    pools = [PoolSize(2, 256), PoolSize(1, 1024)]
    for wanted in ([], pools, [PoolSize(3, 256)], [PoolSize(1, 1024)], [PoolSize(1, 128), PoolSize(1, 700)]):
        assert holds(pools, wanted)
    for wanted in ([PoolSize(4, 256)], [PoolSize(2, 300)], [PoolSize(1, 1025)], [*pools, PoolSize(1, 1024)]):
        assert not holds(pools, wanted)


def test_rejects_too_little_memory() -> None:
    with pytest.raises(
        ValueError, match="keys and values of 4000 tokens, and the longest requests may need 8004"
    ):
        choose_pools([], slots=8, length=2001, capacity=4000, multiple=4)
