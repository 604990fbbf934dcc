"""What prompts share is found, and no more than pays is remembered."""

import random

from phi3_jax.batch.prefixes import Prefixes

DRAWS = random.Random(1)
SYSTEM, OTHER = (DRAWS.choices(range(1000), k=length) for length in (60, 45))


def own(length: int = 20) -> list[int]:
    return DRAWS.choices(range(1000, 9000), k=length)


def test_the_second_prompt_shows_what_is_shared() -> None:
    prefixes = Prefixes()
    assert [prefixes.shared(SYSTEM + own()) for _ in range(4)] == [0, 60, 60, 60]


def test_two_that_take_turns() -> None:
    prefixes = Prefixes()
    found = [prefixes.shared(begin + own()) for _ in range(20) for begin in (SYSTEM, OTHER)]
    assert found == [0, 0, *[60, 45] * 19]


def test_a_longer_beginning_within_a_shorter_one() -> None:
    prefixes = Prefixes()
    longer = SYSTEM + own(100)
    given = [SYSTEM + own(), longer + own(), longer + own(), SYSTEM + own(), longer + own()]
    assert [prefixes.shared(ids) for ids in given] == [0, 60, 160, 60, 160]


def test_the_last_token_is_never_shared() -> None:
    prefixes = Prefixes()
    assert [prefixes.shared(SYSTEM) for _ in range(3)] == [0, 59, 59]
    assert prefixes.shared(SYSTEM[:59]) in (0, 58)


def test_little_is_not_worth_it() -> None:
    prefixes = Prefixes(least=32)
    assert not any(prefixes.shared(SYSTEM[:31] + own()) for _ in range(9))


def test_those_longest_unused_are_forgotten() -> None:
    prefixes = Prefixes(kept=2, recent=1)
    begins = [own(40) for _ in range(3)]
    for begin in begins:
        assert [prefixes.shared(begin + own()) for _ in range(2)] == [0, 40]
    assert [prefixes.shared(begin + own()) for begin in reversed(begins)] == [40, 40, 0]


def test_short_prompts() -> None:
    prefixes = Prefixes(least=1)
    assert [prefixes.shared([5]) for _ in range(3)] == [0, 0, 0]
