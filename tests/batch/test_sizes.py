"""Pools for requests: within memory, within the number of slots, and by need."""

import random

import pytest

from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.batch.sizes import SHORTEST, choose_pools


@pytest.mark.parametrize("seed", range(50))
def test_pools_keep_what_was_given(seed: int) -> None:
    draws = random.Random(seed)
    columns = draws.choice([40, 300, 2049, 8193, 131073])
    slots, multiple = draws.randrange(1, 100), draws.choice([1, 1, 2, 4])
    room = columns * multiple * draws.randrange(1, 50)
    needs = []
    for _ in range(draws.randrange(0, 300)):
        need = min(int(2 ** draws.uniform(2, 18)), columns)
        needs.append((need, draws.randrange(1, need)))
    pools = choose_pools(needs, slots=slots, columns=columns, room=room, multiple=multiple)
    assert [pool.columns for pool in pools] == sorted({pool.columns for pool in pools})
    assert pools[-1].columns == columns
    assert all(pool.slots >= 1 and pool.slots % multiple == 0 for pool in pools)
    assert sum(pool.slots for pool in pools) <= max(slots, multiple)
    assert sum(pool.slots * pool.columns for pool in pools) <= room


def test_short_requests_have_short_slots() -> None:
    needs = [(100, 50)] * 90 + [(1900, 50)] * 10
    short, long = choose_pools(needs, slots=40, columns=2000, room=10**6)
    assert (short, long) == (PoolSize(36, SHORTEST), PoolSize(4, 2000))


def test_what_nobody_has_shown_yet_fits_all_the_same() -> None:
    assert choose_pools([(100, 50)] * 90, slots=8, columns=8193, room=10**6)[-1] == PoolSize(1, 8193)
    assert choose_pools([], slots=8, columns=513, room=10**6) == [PoolSize(8, 513)]


def test_no_memory_for_one() -> None:
    with pytest.raises(
        ValueError, match="keys and values of 4000 tokens, and the longest requests may need 8004"
    ):
        choose_pools([], slots=8, columns=2001, room=4000, multiple=4)
