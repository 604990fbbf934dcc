"""Examples return what was gathered, split each class alike, and have a fingerprint of their contents."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phi3_jax.data.encoding import Example
from phi3_jax.data.examples import Examples
from phi3_jax.data.rows import Place


def example(
    ids: list[int], labels: Any = None, *, line: int = 1, firsts: list[bool] | None = None
) -> Example:
    return Example(ids, labels, Place("train.csv", line), firsts)


def labelled(kind: str, count: int = 60, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        length = int(rng.integers(1, 9))
        labels = {
            "none": None,
            "class": int(rng.integers(0, 3)),
            "numbers": [float(x) for x in rng.integers(0, 2, 4)],
            "tokens": [int(x) for x in rng.integers(-100, 5, length)],
        }[kind]
        examples.append(
            Example(
                [int(x) for x in rng.integers(0, 32064, length)],
                labels,
                Place(f"part-{i % 2}", i + 1, ("line", "row")[i // 2 % 2]),
                [bool(x) for x in rng.integers(0, 2, length)] if kind == "tokens" else None,
                bool(rng.integers(0, 2)),
            )
        )
    return examples


def check_holds(gathered: Examples, expected: list[Example]) -> None:
    assert len(gathered) == len(expected)
    assert gathered.lengths.dtype == np.int32
    assert gathered.lengths.tolist() == [len(x.input_ids) for x in expected]
    assert gathered.truncated.tolist() == [x.truncated for x in expected]
    for i, example in enumerate(expected):
        assert gathered.input_ids(i).dtype == np.int32
        assert gathered.input_ids(i).tolist() == example.input_ids
        assert gathered.place(i) == str(example.place)
        firsts = gathered.firsts(i)
        assert (None if firsts is None else firsts.tolist()) == example.firsts
        row = gathered.row(i)
        assert tuple(row) == gathered.columns
        assert row["input_ids"].tolist() == example.input_ids
        if gathered.flat_labels is not None:
            assert gathered.token_labels(i).tolist() == row["labels"].tolist() == example.labels
        elif gathered.labels is not None:
            assert gathered.labels[i].tolist() == example.labels
        else:
            assert example.labels is None


@pytest.mark.parametrize("kind", ["none", "class", "numbers", "tokens"])
def test_returns_the_gathered_examples(kind: str) -> None:
    examples = labelled(kind)

    def one_by_one() -> Iterator[Example]:
        yield from examples

    gathered = Examples.gather(one_by_one())
    check_holds(gathered, examples)
    chosen = [5, 3, 40, 3]
    check_holds(gathered.subset(np.array(chosen)), [examples[i] for i in chosen])
    if kind == "class":
        assert gathered.labels is not None
        assert gathered.labels.dtype == np.int32
    if kind == "numbers":
        assert gathered.labels is not None
        assert (gathered.labels.dtype, gathered.labels.shape) == (np.float32, (60, 4))


def test_a_subset_shares_the_read_only_flat_arrays() -> None:
    gathered = Examples.gather(labelled("tokens"))
    subset = gathered.subset(np.array([7, 2]))
    assert np.shares_memory(subset.input_ids(0), gathered.flat_input_ids)
    with pytest.raises(ValueError, match="read-only"):
        subset.input_ids(0)[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        gathered.token_labels(0)[0] = 1


def test_gathers_no_examples() -> None:
    gathered = Examples.gather([])
    assert len(gathered) == 0
    assert gathered.fingerprint() == Examples.gather([]).fingerprint()


ONE = example([1, 2], 0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (example([], 0, line=2), r"train.csv, line 2 has no tokens"),
        (
            example([1], [0.5], line=2),
            r"train.csv, line 2 has 1 numbers as labels; earlier examples have one class",
        ),
        (example([1], None, line=2), r"train.csv, line 2 has no labels; .* have one class"),
        (example([1], 0, line=2, firsts=[True]), r"one class and marked words; .* have one class"),
    ],
)
def test_names_an_example_of_another_form(second: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Examples.gather([ONE, second])


def test_names_labels_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"line 1 has 3 labels; expected one for each of its 2 tokens"):
        Examples.gather([example([1, 2], [0, 1, 2])])
    with pytest.raises(ValueError, match=r"line 1 has 1 marks .* one for each of its 2 tokens"):
        Examples.gather([example([1, 2], [0, 1], firsts=[True])])
    with pytest.raises(ValueError, match=r"has 3 numbers as labels; earlier examples have 2 numbers"):
        Examples.gather([example([1], [0.0, 1.0]), example([1], [0.0, 1.0, 1.0])])
    with pytest.raises(ValueError, match=r"train.csv, line 1 has no labels for its tokens"):
        Examples.gather([ONE, example([4], 1)]).token_labels(1)


def lines(examples: Examples) -> list[int]:
    return examples.lines.tolist()


@pytest.mark.parametrize("kind", ["none", "class", "numbers", "tokens"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.99])
def test_a_split_is_disjoint_ordered_and_repeatable(kind: str, fraction: float) -> None:
    whole = Examples.gather(labelled(kind))
    train, validation = whole.split(fraction, 3)
    assert sorted(lines(train) + lines(validation)) == lines(whole)
    assert lines(train) == sorted(lines(train))
    assert lines(validation) == sorted(lines(validation))
    spare = 57 if kind == "class" else 59
    assert len(validation) == min(max(1, round(60 * fraction)), spare)
    again = whole.split(fraction, 3)[1]
    assert lines(again) == lines(validation)
    if fraction == 0.1:
        assert lines(whole.split(fraction, 4)[1]) != lines(validation)


def test_a_split_takes_the_same_fraction_of_every_class() -> None:
    counts = {0: 1000, 1: 100, 2: 9, 3: 1}
    labels = np.repeat(list(counts), list(counts.values()))
    np.random.default_rng(0).shuffle(labels)
    whole = Examples.gather(example([i], int(label), line=i) for i, label in enumerate(labels))
    train, validation = whole.split(0.1, 0)
    assert train.labels is not None
    assert validation.labels is not None
    assert np.bincount(validation.labels, minlength=4).tolist() == [100, 10, 1, 0]
    assert set(train.labels.tolist()) == {0, 1, 2, 3}
    kept = whole.split(0.999, 0)[0]
    assert kept.labels is not None
    assert sorted(kept.labels.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_splits_leave_one_of_each_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(1, 30), rng.integers(30, 200))
    whole = Examples.gather(example([1], int(x), line=i) for i, x in enumerate(labels))
    fraction = float(rng.uniform(0.02, 0.98))
    train, validation = whole.split(fraction, seed)
    kinds = np.unique(labels)
    assert len(validation) == min(max(1, round(fraction * len(labels))), len(labels) - len(kinds))
    assert train.labels is not None
    assert set(train.labels.tolist()) == set(kinds.tolist())


@pytest.mark.parametrize("sizes", [[3] * 10 + [100], [2] * 6 + [9] * 4 + [1], [5] * 20])
def test_a_split_has_every_class_in_both_parts(sizes: list[int]) -> None:
    """Each class of two rows or more, where the fraction allows one row of each."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    whole = Examples.gather(example([1], int(x), line=i) for i, x in enumerate(labels))
    several = {index for index, size in enumerate(sizes) if size > 1}
    for seed in range(5):
        train, validation = whole.split(0.2, seed)
        assert train.labels is not None
        assert validation.labels is not None
        assert set(train.labels.tolist()) == set(range(len(sizes)))
        assert set(validation.labels.tolist()) == several
        assert len(validation) == round(0.2 * len(labels))
    # Too few rows for all: the largest classes have one.
    few = whole.split(4 / len(labels), 0)[1].labels
    assert few is not None
    assert len(set(few.tolist())) == 4 or set(few.tolist()) == {10}
    assert set(np.argsort(sizes, kind="stable")[-1:]) <= set(few.tolist()) or len(set(sizes)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_split_has_every_label_in_both_parts(seed: int) -> None:
    """Rows have several labels; one label is on a single row, which stays for training."""
    rng = np.random.default_rng([3, seed])
    members = rng.random((200, 12)) < np.geomspace(0.02, 0.5, 12)
    members[:, 0] = np.arange(200) == 7
    members[[1, 2, 3], 1] = True
    whole = Examples.gather(example([1], line=i) for i in range(200))
    train, validation = (part.lines for part in whole.split(0.1, seed, members))
    assert len(validation) == 20
    assert members[train].any(axis=0).all()
    assert members[validation].any(axis=0).tolist() == (members.sum(axis=0) > 1).tolist()


def test_a_split_keeps_the_examples_of_a_row_together() -> None:
    parts = [
        Example([1], [1], Place(file, line))
        for file in ("a.txt", "b.txt")
        for line in range(40)
        for _ in range(3)
    ]
    whole = Examples.gather(parts)
    whole = whole.subset(np.random.default_rng(0).permutation(len(whole)))
    train, validation = ({half.place(i) for i in range(len(half))} for half in whole.split(0.25, 0))
    assert not train & validation
    assert (len(train), len(validation)) == (60, 20)
    of_files = [{place[6:] for place in validation if place.startswith(file)} for file in ("a.txt", "b.txt")]
    assert of_files[0] != of_files[1]  # lines of one number in two files are two rows


def test_rejects_an_impossible_split() -> None:
    with pytest.raises(ValueError, match="none of 2 rows can be used for validation"):
        Examples.gather([ONE, example([1], 1, line=2)]).split(0.5, 0)
    with pytest.raises(ValueError, match="none of 1 rows can be used for validation"):
        Examples.gather([example([1]), example([2])]).split(0.5, 0)
    with pytest.raises(ValueError, match="none of 0 rows can be used for validation"):
        Examples.gather([]).split(0.5, 0)
    for fraction in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"fraction={fraction} .* expected a number between 0 and 1"):
            Examples.gather([ONE, ONE]).split(fraction, 0)


@pytest.mark.parametrize("kind", ["none", "class", "numbers", "tokens"])
def test_a_fingerprint_depends_on_the_contents_and_their_order(kind: str) -> None:
    examples = labelled(kind)
    whole = Examples.gather(examples)
    assert whole.fingerprint() == Examples.gather(examples).fingerprint()
    moved = [replace(x, place=Place("elsewhere.csv", 1)) for x in examples]
    assert Examples.gather(moved).fingerprint() == whole.fingerprint()
    # A subset reads the flat arrays in pieces, and equals one that was gathered in this order.
    order = np.random.default_rng(1).permutation(60)[:40]
    order[10:20] = np.arange(10, 20)
    subset = whole.subset(order)
    assert subset.fingerprint() == Examples.gather([examples[i] for i in order]).fingerprint()
    others = {whole.fingerprint(), subset.fingerprint(), whole.subset(order[::-1]).fingerprint()}
    last = examples[-1]
    others.add(
        Examples.gather([*examples[:-1], replace(last, input_ids=[*last.input_ids[:-1], 7])]).fingerprint()
    )
    size = 4
    if kind == "class":
        others.add(Examples.gather([*examples[:-1], replace(last, labels=3)]).fingerprint())
        size += 1
    if kind == "numbers":
        others.add(Examples.gather([*examples[:-1], replace(last, labels=[0.5] * 4)]).fingerprint())
        size += 1
    if kind == "tokens":
        others.add(
            Examples.gather([*examples[:-1], replace(last, labels=[9] * len(last.labels))]).fingerprint()
        )
        size += 1
    assert len(others) == size


def test_a_fingerprint_depends_on_where_examples_end() -> None:
    together = Examples.gather([example([1, 2]), example([3])])
    apart = Examples.gather([example([1]), example([2, 3])])
    assert together.fingerprint() != apart.fingerprint()
