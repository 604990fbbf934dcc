"""An epoch has every example once, in a width that holds it; widths need the least padding."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from phi3_jax.data.batches import BatchPlan, bucket_widths, permutation
from phi3_jax.sizes import ceil_div, round_up


def lengths_of(seed: int, most: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(3.5, 1.0, rng.integers(1, most)).astype(np.int32) + 1, 512)


def plan_of(seed: int, shuffle: bool = True) -> tuple[BatchPlan, np.ndarray]:
    lengths = lengths_of(seed)
    widths = bucket_widths(lengths, most=1 + seed % 5)
    return BatchPlan(lengths, rows=1 + seed % 7, widths=widths, shuffle=shuffle, seed=seed), lengths


def epoch_of(plan: BatchPlan, epoch: int) -> list[tuple[int, list[int]]]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [(width, indices.tolist()) for width, indices in map(plan.batch, steps)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_an_epoch_has_every_example_once_in_a_width_that_holds_it(seed: int, shuffle: bool) -> None:
    plan, lengths = plan_of(seed, shuffle)
    assert plan.steps_per_epoch == ceil_div(len(lengths), plan.rows)
    for epoch in (0, 1, 5):
        steps = epoch_of(plan, epoch)
        assert all(len(indices) == plan.rows for _, indices in steps)
        rows = [[i for i in indices if i >= 0] for _, indices in steps]
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert sum(len(row) < plan.rows for row in rows) == (len(lengths) % plan.rows != 0)
        for (width, _), row in zip(steps, rows, strict=True):
            # The width fits the longest example, also in a batch of only narrower ones.
            assert width == min(w for w in plan.widths if w >= lengths[row].max())


@pytest.mark.parametrize("seed", range(10))
def test_at_most_one_batch_per_border_mixes_widths(seed: int) -> None:
    plan, lengths = plan_of(seed)
    mixed = 0
    for width, indices in epoch_of(plan, 0):
        narrower = [w for w in plan.widths if w < width]
        mixed += any(lengths[i] <= max(narrower, default=0) for i in indices if i >= 0)
    assert mixed <= len(plan.widths) - 1


@pytest.mark.parametrize("seed", range(10))
def test_steps_do_not_depend_on_the_order_of_calls(seed: int) -> None:
    plan, lengths = plan_of(seed)
    steps = [epoch_of(plan, epoch) for epoch in range(4)]
    flat = list(itertools.chain(*steps))
    other = BatchPlan(lengths.tolist(), rows=plan.rows, widths=plan.widths[::-1], shuffle=True, seed=seed)
    for number in np.random.default_rng(seed).permutation(len(flat)):
        width, indices = other.batch(int(number))
        assert (width, indices.tolist()) == flat[number]


def test_only_shuffled_epochs_differ() -> None:
    lengths = lengths_of(3)
    widths = bucket_widths(lengths, most=3)
    plans = [BatchPlan(lengths, rows=4, widths=widths, shuffle=True, seed=seed) for seed in (0, 1)]
    epochs = [epoch_of(plan, epoch) for plan in plans for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    # The batches have other examples, and not only another order.
    batches = [{frozenset(row) for _, row in epoch} for epoch in epochs]
    assert all(a != b for a, b in itertools.combinations(batches, 2))
    evaluation = BatchPlan(lengths, rows=4, widths=widths, shuffle=False)
    assert epoch_of(evaluation, 0) == epoch_of(evaluation, 7)
    order = [lengths[i] for _, row in epoch_of(evaluation, 0) for i in row if i >= 0]
    assert order == sorted(lengths, reverse=True)


def test_shuffles_batches_of_all_widths() -> None:
    lengths = np.repeat([8, 16, 24, 32], 100)
    plan = BatchPlan(lengths, rows=4, widths=(8, 16, 24, 32), shuffle=True)
    widths = [width for width, _ in epoch_of(plan, 0)]
    assert sorted(widths) == [8] * 25 + [16] * 25 + [24] * 25 + [32] * 25
    assert np.count_nonzero(np.diff(widths)) > 50
    one_width = BatchPlan(np.full(39, 8), rows=4, widths=(8,), shuffle=True)
    partial = {[row.count(-1) for _, row in epoch_of(one_width, epoch)].index(1) for epoch in range(20)}
    assert len(partial) > 3


def lengths_by_class(seed: int, count: int = 6000) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lengths of text messages, and which of them are spam: 13 in 100, mostly the long ones."""
    rng = np.random.default_rng([99, seed])
    spam = rng.random(count) < 0.134
    short, long = rng.lognormal(2.75, 0.6, count), rng.normal(42, 8, count)
    return np.where(spam, long.clip(8, 70), short.clip(3, 150)).astype(int), spam


@pytest.mark.parametrize(("rows", "batches"), [(16, 4), (32, 4), (32, 8)])
def test_classes_of_different_lengths_are_mixed_as_by_chance(rows: int, batches: int) -> None:
    """Counts the spam of each step: how often there is none, how often most is, and how much counts vary."""
    lengths, spam = lengths_by_class(rows)
    widths = bucket_widths(lengths, most=6)
    plan = BatchPlan(lengths, rows=rows // batches, widths=widths, shuffle=True, step_batches=batches)
    taken = [plan.batch(number) for number in range(plan.batches_per_epoch)]
    steps = np.array([indices for _, indices in taken]).reshape(-1, rows)
    assert len(steps) == plan.steps_per_epoch
    assert sorted(index for index in steps.ravel() if index >= 0) == list(range(len(lengths)))
    counts = np.where(steps < 0, False, spam[steps]).sum(axis=1)
    share = spam.mean()
    assert np.mean(counts == 0) < 1.5 * (1 - share) ** rows + 0.02
    assert np.mean(counts > rows / 2) == 0
    assert counts.std() < 1.25 * np.sqrt(rows * share * (1 - share))
    # The place of a step among those of its sample does not tell its lengths.
    whole = steps[: len(steps) // 8 * 8 - 8]
    means = lengths[whole].reshape(-1, 8, rows).mean(axis=(0, 2))
    assert means.max() < 1.15 * means.min()
    # Sorting all examples by their width pads little less.
    by_width = BatchPlan(lengths, rows=rows, widths=widths, shuffle=True)
    sizes = [by_width.batch(number)[0] * rows for number in range(by_width.batches_per_epoch)]
    assert sum(width * rows // batches for width, _ in taken) < 1.15 * sum(sizes)
    for width, indices in taken:
        used = lengths[indices[indices >= 0]]
        assert width == min(w for w in widths if w >= max(used, default=0))


def test_batches_of_several_ranges_have_the_same_examples_in_each_step() -> None:
    lengths, _ = lengths_by_class(1, 500)
    options = {"widths": bucket_widths(lengths, most=3), "shuffle": True, "step_ranges": 4}
    fine = BatchPlan(lengths, rows=2, step_batches=4, **options)
    coarse = BatchPlan(lengths, rows=4, step_batches=2, **options)
    ours, expected = (
        np.array([plan.batch(number)[1] for number in range(plan.batches_per_epoch)]).reshape(-1, 8)
        for plan in (coarse, fine)
    )
    np.testing.assert_array_equal(ours, expected)


def test_steps_of_several_batches_differ_by_epoch_and_seed() -> None:
    lengths, _ = lengths_by_class(0, 70)
    options = {"rows": 2, "widths": bucket_widths(lengths, most=3), "shuffle": True, "step_batches": 4}
    plans = [BatchPlan(lengths, seed=seed, **options) for seed in (0, 0, 1)]
    assert plans[0].batches_per_epoch == 4 * plans[0].steps_per_epoch == 4 * 9
    first, same, other = ([plan.batch(number)[1].tolist() for number in range(72)] for plan in plans)
    assert first == same
    assert first[:36] != first[36:]
    assert first[:36] != other[:36]
    assert sum(index < 0 for batch in first[:36] for index in batch) == 2


def test_threads_share_a_new_epoch() -> None:
    plan, _ = plan_of(8)
    plan_epoch, epochs = plan._plan_epoch, []

    def slow(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        epochs.append(epoch)
        time.sleep(0.05)
        return plan_epoch(epoch)

    plan._plan_epoch = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(plan.batch, range(8)))
    assert epochs == [0]
    plan._plan_epoch = plan_epoch  # type: ignore[method-assign]
    numbers = list(range(plan.steps_per_epoch * 3)) * 4
    with ThreadPoolExecutor(8) as pool:
        steps = list(pool.map(lambda number: plan.batch(number)[1].tolist(), numbers))
    assert steps == [plan.batch(number)[1].tolist() for number in numbers]
    assert len(plan._epochs) == 2


def test_steps_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        plan_of(1)[0].batch(0)[1][0] = 3


def test_rejects_arguments_without_a_plan() -> None:
    with pytest.raises(
        ValueError, match=r"2 of 3 examples are longer than the widest batch, 16 tokens .* 40"
    ):
        BatchPlan(np.array([3, 17, 40]), rows=2, widths=(8, 16), shuffle=True)
    with pytest.raises(ValueError, match="no examples"):
        BatchPlan(np.array([], int), rows=2, widths=(8,), shuffle=True)
    with pytest.raises(ValueError, match=r"rows=0 and widths=\[8\]"):
        BatchPlan(np.array([3]), rows=0, widths=(8,), shuffle=True)
    with pytest.raises(IndexError, match="batch -1 does not exist"):
        plan_of(1)[0].batch(-1)


def test_a_permutation_never_changes() -> None:
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(1000, 1, 2)) == list(range(1000))
    assert permutation(50, 1, 2).tolist() != permutation(50, 2, 1).tolist()


def padded(lengths: np.ndarray, widths: tuple[int, ...]) -> int:
    return sum(min(w for w in widths if w >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_widths_pad_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, rng.integers(1, 40))
    most, multiple = int(rng.integers(1, 5)), int(rng.choice([1, 4, 8]))
    widths = bucket_widths(lengths, most=most, multiple=multiple)
    assert len(widths) <= most
    assert list(widths) == sorted(set(widths))
    assert all(w % multiple == 0 for w in widths)
    last = round_up(int(lengths.max()), multiple)
    assert widths[-1] == last
    candidates = np.unique(-(-lengths // multiple) * multiple)[:-1]
    best = min(
        padded(lengths, (*others, last))
        for count in range(min(most, len(candidates) + 1))
        for others in itertools.combinations(candidates, count)
    )
    assert padded(lengths, widths) == best


def test_rejects_widths_of_no_examples() -> None:
    with pytest.raises(ValueError, match="no examples"):
        bucket_widths(np.array([], int))


@pytest.mark.slow
def test_plans_a_million_examples_in_seconds() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.5, 1_000_000).astype(int) + 1, 131072)
    start = time.process_time()
    widths = bucket_widths(lengths)
    plan = BatchPlan(lengths, rows=64, widths=widths, shuffle=True)
    plan.batch(plan.steps_per_epoch)
    assert time.process_time() - start < 10
