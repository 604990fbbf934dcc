"""Packed rows are full and never too long, and keep their examples apart."""

import time

import numpy as np
import pytest

from phi3_jax.data.encoding import Example
from phi3_jax.data.examples import Examples
from phi3_jax.data.packing import PackedExamples, pack
from phi3_jax.data.rows import Place


def check_packing(rows: list[np.ndarray], lengths: np.ndarray, width: int) -> None:
    assert np.sort(np.concatenate(rows)).tolist() == list(range(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= width


@pytest.mark.parametrize("seed", range(50))
def test_packs_every_example_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 100))
    lengths = rng.integers(1, width + 1, rng.integers(1, 200))
    rows = pack(lengths, width)
    check_packing(rows, lengths, width)
    # No two rows fit into one, so at most one row is less than half full.
    assert sum(lengths[row].sum() * 2 <= width for row in rows) <= 1
    assert [row.tolist() for row in pack(lengths, width)] == [row.tolist() for row in rows]


@pytest.mark.parametrize("seed", range(30))
def test_packs_by_best_fit_decreasing(seed: int) -> None:
    """Compares the lengths of rows with best fit decreasing, example by example."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, 150)
    totals: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, total in enumerate(totals) if total + length <= 40]
        if fitting:
            totals[max(fitting, key=lambda i: totals[i])] += length
        else:
            totals.append(length)
    rows = pack(lengths, 40)
    assert sorted(lengths[row].sum() for row in rows) == sorted(totals)


@pytest.mark.parametrize(("mean", "width"), [(4.5, 2048), (5.5, 2048), (6.0, 4096), (7.0, 8192)])
def test_fills_rows_of_realistic_lengths(mean: float, width: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(mean, 0.8, 5000).astype(int) + 1, width)
    rows = pack(lengths, width)
    check_packing(rows, lengths, width)
    assert lengths.sum() / (len(rows) * width) >= 0.95


@pytest.mark.parametrize("seed", range(10))
def test_groups_never_share_a_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, 100)
    groups = (lengths > 12).astype(int)
    rows = pack(lengths, 64, groups=groups)
    check_packing(rows, lengths, 64)
    assert all(len(np.unique(groups[row])) == 1 for row in rows)
    assert any(len(np.unique(groups[row])) == 2 for row in pack(lengths, 64))


def test_rejects_lengths_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"1 of 3 examples .* rows of 8 tokens \(lengths are 2 to 9\)"):
        pack(np.array([2, 9, 8]), 8)
    with pytest.raises(ValueError, match=r"1 of 2 examples .* expected 1 to 8 tokens"):
        pack(np.array([0, 8]), 8)
    assert pack(np.array([], int), 8) == []


def examples_of(tokens: list[list[int]], labels: list[list[int]] | None = None) -> Examples:
    return Examples.gather(
        Example(ids, None if labels is None else labels[i], Place("a.jsonl", i + 1))
        for i, ids in enumerate(tokens)
    )


def test_a_row_concatenates_its_examples() -> None:
    examples = examples_of([[5, 6, 7], [8], [9, 10]], [[5, -100, 7], [8], [9, 10]])
    packed = PackedExamples(examples, [np.array([0, 2]), np.array([1])])
    assert (len(packed), packed.lengths.tolist()) == (2, [5, 1])
    row = packed.row(0)
    assert tuple(row) == packed.columns
    assert {name: values.tolist() for name, values in row.items()} == {
        "input_ids": [5, 6, 7, 9, 10],
        "labels": [-100, -100, 7, -100, 10],
        "position_ids": [0, 1, 2, 0, 1],
        "segment_ids": [1, 1, 1, 2, 2],
    }
    assert all(values.dtype == np.int32 for values in row.values())
    assert packed.place(0) == "a.jsonl, line 1 and 1 packed with it"
    assert packed.place(1) == "a.jsonl, line 2"
    # The examples themselves keep their labels.
    assert examples.token_labels(0).tolist() == [5, -100, 7]


def test_rejects_examples_without_token_labels() -> None:
    with pytest.raises(ValueError, match="no labels for tokens"):
        PackedExamples(examples_of([[1]]), [np.array([0])])


def test_a_fingerprint_depends_on_tokens_and_packing() -> None:
    examples = examples_of([[5, 6, 7], [8], [9, 10]], [[5, 6, 7], [8], [9, 10]])
    other = examples_of([[5, 6, 7], [8], [9, 11]], [[5, 6, 7], [8], [9, 10]])
    packings = ([[0, 2], [1]], [[2, 0], [1]], [[0], [2, 1]])
    digests = [
        PackedExamples(given, [np.array(row) for row in rows]).fingerprint()
        for given in (examples, other)
        for rows in packings
    ]
    assert len(set(digests)) == 6
    assert PackedExamples(examples, [np.array([0, 2]), np.array([1])]).fingerprint() == digests[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [4096, 131072])
def test_packs_a_million_examples_in_seconds(width: int) -> None:
    rng = np.random.default_rng(0)
    for lengths in (
        rng.integers(1, width + 1, 1_000_000),
        np.minimum(rng.lognormal(6, 1.5, 1_000_000).astype(int) + 1, width),
    ):
        start = time.process_time()
        rows = pack(lengths, width)
        assert time.process_time() - start < 10
        check_packing(rows, lengths, width)
        assert lengths.sum() / (len(rows) * width) >= 0.95
