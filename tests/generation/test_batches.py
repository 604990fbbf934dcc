"""Tests that a row's tokens do not depend on the rest of the batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from marks import slow
from reference import longrope
from rows import alone, answers, assert_varied
from twins import PAD, Twins, prompts

COUNT = 30
POOL = 24
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "longrope": longrope(),
    "longrope and window": longrope() | {"sliding_window": 7},
}


class Pool:
    """Prompts of 1 to 40 tokens, and the reference's continuation of each alone."""

    def __init__(self, twins: Twins):
        rng = np.random.default_rng(31)
        lengths = rng.permutation(np.append(rng.integers(1, 41, POOL - 4), [1, 15, 16, 40]))
        self.twins = twins
        self.ids, self.mask = prompts(lengths.tolist(), seed=32)
        self.new = alone(twins, self.ids, self.mask, COUNT)

    def check(self, chosen: np.ndarray, side: str) -> None:
        """Checks that a batch of the `chosen` prompts continues each as alone."""
        length = self.mask[chosen].sum(axis=1).max()
        ids, mask = self.ids[chosen, -length:], self.mask[chosen, -length:]
        if side == "right":
            order = np.argsort(1 - mask, axis=1, kind="stable")
            ids, mask = np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)
        np.testing.assert_array_equal(answers(self.twins, ids, mask, COUNT), self.new[chosen])


@pytest.fixture(scope="module")
def pool_of(twins_of: Callable[..., Twins]) -> Callable[[str], Pool]:
    """Returns `pool_of(name)`, which makes the prompts for a config once."""
    pools: dict[str, Pool] = {}

    def get(name: str) -> Pool:
        if name not in pools:
            pools[name] = Pool(twins_of(**CONFIGS[name]))
        return pools[name]

    return get


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("longrope and window", (9, 1, 9)),
        *(slow(name, tuple(range(1, 10))) for name in CONFIGS),
    ],
)
def test_random_batches(pool_of: Callable[[str], Pool], name: str, sizes: tuple[int, ...]) -> None:
    """Checks two batches of each size, with repetitions: one padded left, one right."""
    pool, rng = pool_of(name), np.random.default_rng(33)
    assert len(set(map(tuple, pool.new.tolist()))) == POOL
    for case in range(2 * len(sizes)):
        chosen = rng.integers(0, POOL, sizes[case % len(sizes)])
        pool.check(chosen, "left" if case % 2 else "right")


def test_equal_rows_next_to_each_other(pool_of: Callable[[str], Pool]) -> None:
    pool_of("longrope and window").check(np.array([5, 5, 5, 2, 2, 7, 5, 2, 2]), "left")


@pytest.mark.parametrize("size", [9, slow(2), slow(17), slow(33)])
def test_rows_end_at_different_times(pool_of: Callable[[str], Pool], size: int) -> None:
    """Each row stops after its first end token and is padded to the length of the longest row."""
    pool = pool_of("longrope and window")
    counts = np.bincount(pool.new[:, 1:].ravel(), minlength=96)
    ends = np.argsort(-counts)[:4].tolist()
    chosen = np.random.default_rng(size).integers(0, POOL, size)
    new = pool.new[chosen]
    stops = [int(np.append(np.flatnonzero(np.isin(row, ends)), COUNT - 1)[0]) for row in new]
    assert len(set(stops)) > 1
    expected = np.full((size, max(stops) + 1), PAD)
    for row, stop in enumerate(stops):
        expected[row, : stop + 1] = new[row, : stop + 1]
    ids, mask = pool.ids[chosen], pool.mask[chosen]
    np.testing.assert_array_equal(answers(pool.twins, ids, mask, COUNT, eos_token_id=ends), expected)


@pytest.mark.slow
def test_returned_caches_hold_their_rows_alone(pool_of: Callable[[str], Pool]) -> None:
    """Rows that continue from returned caches still do not depend on each other."""
    pool = pool_of("longrope and window")
    ids, mask = pool.ids[:9], pool.mask[:9]
    out = pool.twins.ours(ids, mask, max_new_tokens=10, return_dict_in_generate=True)
    assert out.past_key_values.batch_size == 9
    longer = np.concatenate([mask, np.ones((9, 10), np.int64)], axis=1)
    new = answers(
        pool.twins, np.asarray(out.sequences), longer, COUNT - 10, past_key_values=out.past_key_values
    )
    np.testing.assert_array_equal(new, pool.new[:9, 10:])


@pytest.mark.slow
def test_padding_inside_a_prompt(pool_of: Callable[[str], Pool]) -> None:
    """Padding at any position changes nothing."""
    pool, rng = pool_of("longrope"), np.random.default_rng(34)
    rows = [ids[used] for ids, used in zip(pool.ids[:4], pool.mask[:4].astype(bool), strict=True)]
    ids, mask = np.full((4, 60), PAD), np.zeros((4, 60), np.int64)
    for row, tokens in enumerate(rows):
        used = np.sort(rng.choice(60, len(tokens), replace=False))
        ids[row, used], mask[row, used] = tokens, 1
    np.testing.assert_array_equal(answers(pool.twins, ids, mask, COUNT), pool.new[:4])


def test_the_pool_is_varied(pool_of: Callable[[str], Pool]) -> None:
    assert_varied(pool_of("longrope and window").new)
