"""Loading batches: their contents and order, resuming, several processes, and the end of threads."""

import gc
import itertools
import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from phi3_jax.data.batches import BatchPlan, bucket_widths
from phi3_jax.data.encoding import Example
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import Batch, load
from phi3_jax.data.packing import PackedExamples, pack
from phi3_jax.data.rows import Place

PAD = 31999


def examples_of(kind: str, count: int = 23, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)

    def example(i: int) -> Example:
        length = int(rng.integers(1, 40))
        labels: dict[str, Any] = {
            "none": None,
            "class": i % 3,
            "numbers": [i / 8, 1.0],
            "tokens": rng.integers(-100, 50, length).tolist(),
        }
        return Example(rng.integers(0, 1000, length).tolist(), labels[kind], Place("train.csv", i + 1))

    return Examples.gather(example(i) for i in range(count))


def plan_of(examples: Examples | PackedExamples, rows: int = 4, shuffle: bool = True) -> BatchPlan:
    widths = bucket_widths(examples.lengths, most=3)
    return BatchPlan(examples.lengths, rows=rows, widths=widths, shuffle=shuffle, seed=1)


def packed_of(count: int = 30) -> PackedExamples:
    examples = examples_of("tokens", count)
    return PackedExamples(examples, pack(examples.lengths, 64))


def same(one: Batch, other: Batch) -> bool:
    return (
        (one.number, one.width) == (other.number, other.width)
        and one.indices.tolist() == other.indices.tolist()
        and one.arrays.keys() == other.arrays.keys()
        and all(
            array.dtype == other.arrays[name].dtype and np.array_equal(array, other.arrays[name])
            for name, array in one.arrays.items()
        )
    )


def check_batch(batch: Batch, examples: Examples | PackedExamples, plan: BatchPlan) -> None:
    """Compares a batch with the plan, token by token."""
    width, indices = plan.batch(batch.number)
    assert batch.width == width
    assert batch.indices.tolist() == indices.tolist()
    padding = {"input_ids": PAD, "labels": -100, "position_ids": 0, "segment_ids": 0}
    for row, index in enumerate(indices):
        columns = examples.row(index) if index >= 0 else dict.fromkeys(examples.columns, np.array([], int))
        length = len(columns["input_ids"])
        assert batch.arrays["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
        for name, values in columns.items():
            expected = [*values.tolist(), *[padding[name]] * (width - length)]
            assert batch.arrays[name][row].tolist() == expected
    for name in (*examples.columns, "attention_mask"):
        assert batch.arrays[name].dtype == np.int32
        assert batch.arrays[name].shape == (plan.rows, width)


@pytest.mark.parametrize("kind", ["none", "class", "numbers", "tokens", "packed"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_follow_the_plan(kind: str, shuffle: bool) -> None:
    examples = packed_of() if kind == "packed" else examples_of(kind)
    plan = plan_of(examples, shuffle=shuffle)
    stop = plan.steps_per_epoch * 2 + 1
    batches = list(load(examples, plan, pad_token_id=PAD, stop=stop))
    assert [batch.number for batch in batches] == list(range(stop))
    assert any(-1 in batch.indices for batch in batches)
    for batch in batches:
        check_batch(batch, examples, plan)
        names = {*examples.columns, "attention_mask"}
        if examples.labels is not None:
            names |= {"labels", "weights"}
            labels, weights = batch.arrays["labels"], batch.arrays["weights"]
            none = batch.indices < 0
            assert weights.dtype == np.float32
            assert weights.tolist() == [0.0 if x else 1.0 for x in none]
            assert labels.dtype == examples.labels.dtype
            assert np.array_equal(labels[~none], examples.labels[batch.indices[~none]])
            assert (labels[none] == (-100 if kind == "class" else 0.0)).all()
        assert set(batch.arrays) == names


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resumes_from_every_state(threads: int) -> None:
    examples = examples_of("class")
    plan = plan_of(examples)
    stop = plan.steps_per_epoch * 2 + 1

    def loader(**options: Any) -> Any:
        return load(examples, plan, pad_token_id=PAD, stop=stop, threads=threads, **options)

    whole = list(loader())
    for taken in range(stop + 1):
        first = loader()
        batches = list(itertools.islice(first, taken))
        state = json.loads(json.dumps(first.get_state()))
        first.close()
        # Another loader resumes, whatever its own start is, before or after its first batch.
        second = loader(start=min(2, stop))
        if taken % 2:
            next(second)
        second.set_state(state)
        rest = list(second)
        assert all(map(same, [*batches, *rest], whole)), taken
        assert len(batches) + len(rest) == len(whole)
        assert all(map(same, loader(start=taken), whole[taken:])), taken


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["class", "packed"])
def test_processes_make_their_rows_of_the_batch(kind: str, processes: int) -> None:
    examples = packed_of(60) if kind == "packed" else examples_of(kind)
    plan = plan_of(examples, rows=6)
    stop = plan.steps_per_epoch
    whole = list(load(examples, plan, pad_token_id=PAD, stop=stop))
    # A mesh may give a process rows that are not consecutive.
    shares = [np.arange(6)[process::processes][::-1] for process in range(processes)]
    parts = [
        list(load(examples, plan_of(examples, rows=6), pad_token_id=PAD, stop=stop, local_rows=share))
        for share in shares
    ]
    for number, batch in enumerate(whole):
        for share, part in zip(shares, parts, strict=True):
            own = part[number]
            assert (own.number, own.width) == (batch.number, batch.width)
            assert own.indices.tolist() == batch.indices.tolist()
            assert own.arrays.keys() == batch.arrays.keys()
            for name, array in own.arrays.items():
                assert np.array_equal(array, batch.arrays[name][share])


def test_never_stops_by_default() -> None:
    examples = examples_of("none")
    plan = plan_of(examples)
    far = plan.steps_per_epoch * 1_000_000
    loader = load(examples, plan, pad_token_id=PAD, start=far)
    batch = next(loader)
    loader.close()
    assert batch.number == far
    check_batch(batch, examples, plan)


def waiting_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def check_no_thread_is_left() -> None:
    """Waits, as a thread ends shortly after the request."""
    deadline = time.monotonic() + 5
    while waiting_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not waiting_threads()


class Failing:
    """Examples, one of which cannot be read."""

    labels = None
    columns = ("input_ids",)

    def __init__(self, examples: Examples, bad: int):
        self.examples = examples
        self.bad = bad

    def row(self, index: int) -> dict[str, np.ndarray]:
        if index == self.bad:
            raise OSError("the disk is gone")
        return self.examples.row(index)

    def place(self, index: int) -> str:
        return self.examples.place(index)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_a_thread_names_the_row(threads: int) -> None:
    examples = examples_of("none")
    plan = plan_of(examples)
    step = next(i for i in range(plan.steps_per_epoch) if 7 in plan.batch(i)[1])
    row = plan.batch(step)[1].tolist().index(7)
    loader = load(Failing(examples, 7), plan, pad_token_id=PAD, threads=threads)
    taken = [next(loader).number for _ in range(step)]
    assert taken == list(range(step))
    message = f"cannot make row {row} of batch {step} from train.csv, line 8: the disk is gone"
    with pytest.raises(RuntimeError, match=message) as caught:
        next(loader)
    assert isinstance(caught.value.__cause__, OSError)
    # The batch that failed is still the next one, and is not skipped.
    assert loader.get_state()["next_index"] == step
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    del caught
    check_no_thread_is_left()


def test_leaves_no_thread() -> None:
    examples = examples_of("none")
    plan = plan_of(examples)

    def started(**options: Any) -> Any:
        loader = load(examples, plan, pad_token_id=PAD, **options)
        next(loader)
        return loader

    check_no_thread_is_left()
    gc.disable()  # so that only the last reference ends them
    try:
        closed = started()
        assert waiting_threads()
        closed.close()
        closed.close()
        check_no_thread_is_left()

        ended = started(stop=3)
        assert waiting_threads()
        assert len(list(ended)) == 2
        assert next(ended, None) is None
        assert ended.get_state()["next_index"] == 3
        check_no_thread_is_left()

        dropped = started()
        assert waiting_threads()
        del dropped
        check_no_thread_is_left()
    finally:
        gc.enable()


def test_makes_batches_ahead() -> None:
    examples = examples_of("none")
    plan = plan_of(examples)
    loader = load(examples, plan, pad_token_id=PAD, prefetch=3)
    steps: list[int] = []
    step = plan.batch
    plan.batch = lambda number: (steps.append(number), step(number))[1]  # type: ignore[method-assign]
    next(loader)
    deadline = time.monotonic() + 5
    while len(steps) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(steps) == [0, 1, 2, 3]
    loader.close()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_rejects_a_bad_range_of_batches(start: int, stop: int) -> None:
    examples = examples_of("none")
    with pytest.raises(ValueError, match=f"batches from {start} to {stop}"):
        load(examples, plan_of(examples), pad_token_id=PAD, start=start, stop=stop)


def test_rejects_a_state_after_the_end() -> None:
    examples = examples_of("none")
    loader = load(examples, plan_of(examples), pad_token_id=PAD, stop=3)
    with pytest.raises(IndexError, match="out of range"):
        loader.set_state({"next_index": 4})
