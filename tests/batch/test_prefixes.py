"""Shared prefixes are found, and only useful ones are remembered."""

import random

from phi3_jax.batch.prefixes import PrefixFinder

DRAWS = random.Random(1)
SYSTEM, OTHER = (DRAWS.choices(range(1000), k=length) for length in (60, 45))


def own(length: int = 20) -> list[int]:
    return DRAWS.choices(range(1000, 9000), k=length)


def test_finds_a_prefix_at_the_second_prompt() -> None:
    prefixes = PrefixFinder()
    assert [prefixes.shared_length(SYSTEM + own()) for _ in range(4)] == [0, 60, 60, 60]


def test_finds_two_prefixes_in_turn() -> None:
    prefixes = PrefixFinder()
    lengths = [prefixes.shared_length(prefix + own()) for _ in range(20) for prefix in (SYSTEM, OTHER)]
    assert lengths == [0, 0, *[60, 45] * 19]


def test_finds_a_longer_prefix_that_extends_a_shorter_one() -> None:
    prefixes = PrefixFinder()
    longer = SYSTEM + own(100)
    given = [SYSTEM + own(), longer + own(), longer + own(), SYSTEM + own(), longer + own()]
    assert [prefixes.shared_length(ids) for ids in given] == [0, 60, 160, 60, 160]


def test_never_shares_the_last_token() -> None:
    prefixes = PrefixFinder()
    assert [prefixes.shared_length(SYSTEM) for _ in range(3)] == [0, 59, 59]
    assert prefixes.shared_length(SYSTEM[:59]) in (0, 58)


def test_ignores_short_prefixes() -> None:
    prefixes = PrefixFinder(min_length=32)
    assert not any(prefixes.shared_length(SYSTEM[:31] + own()) for _ in range(9))


def test_forgets_the_least_recently_used_prefix() -> None:
    prefixes = PrefixFinder(capacity=2, recent=1)
    shared = [own(40) for _ in range(3)]
    for prefix in shared:
        assert [prefixes.shared_length(prefix + own()) for _ in range(2)] == [0, 40]
    assert [prefixes.shared_length(prefix + own()) for prefix in reversed(shared)] == [40, 40, 0]


def test_shares_nothing_of_one_token() -> None:
    prefixes = PrefixFinder(min_length=1)
    assert [prefixes.shared_length([5]) for _ in range(3)] == [0, 0, 0]
