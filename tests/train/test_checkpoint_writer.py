"""Checkpoints for a store: what waits, what is skipped, and what is tried again."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from phi3_jax.train.checkpoint_writer import ATTEMPTS, CheckpointWriter, Snapshot

from phi3_jax.storage.claims import TakenOverError

PAUSE = 0.002


class FakeStore:
    """Writes snapshots when it may, and fails as often as it is told."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.errors: list[Exception] = []
        self.written: list[tuple[int, bool]] = []

    def write(self, snapshot: Snapshot, again: bool) -> None:
        self.open.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.written.append((snapshot.step, again))


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def writer(store: FakeStore) -> Iterator[CheckpointWriter]:
    made = CheckpointWriter(store.write, lambda step, error: ValueError(f"{step}: {error}"), pause=PAUSE)
    yield made
    store.open.set()
    made.close()


def add(writer: CheckpointWriter, step: int, best: bool = False) -> bool:
    taken = writer.accepts(step, best=best)
    if taken:
        writer.add(Snapshot(step, None, {}, 0.0, best))
    return taken


def poll_until(writer: CheckpointWriter, done: Any) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        writer.poll()
        time.sleep(PAUSE)


def test_skips_what_comes_while_one_is_written_but_not_the_best(
    store: FakeStore, writer: CheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    store.open.clear()
    with caplog.at_level(logging.WARNING):
        assert [add(writer, step, best) for step, best in ((1, True), (2, False), (3, True), (4, True))] == [
            *(True, False, True, True)
        ]
        assert not add(writer, 5)
    assert caplog.messages == [
        f"step {step} gets no checkpoint: that of step 1 is still being written" for step in (2, 5)
    ]
    store.open.set()
    writer.drain()
    assert store.written == [(1, False), (4, False)]


def test_tries_again_between_steps(
    store: FakeStore, writer: CheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    store.errors = [OSError("no answer")] * 3
    with caplog.at_level(logging.WARNING):
        add(writer, 1)
        poll_until(writer, lambda: store.written)
    assert store.written == [(1, True)]
    assert caplog.messages == ["the checkpoint of step 1 is not written: 1: no answer; trying again"] * 3


@pytest.mark.parametrize(("best", "written"), [((False, False), 2), ((True, False), 1), ((True, True), 2)])
def test_a_later_one_replaces_one_that_failed_unless_that_is_the_best(
    store: FakeStore, writer: CheckpointWriter, best: tuple[bool, bool], written: int
) -> None:
    writer._pause = 0.2  # so that the next attempt has not begun
    store.errors = [OSError()]
    store.open.clear()
    add(writer, 1, best[0])
    store.open.set()
    poll_until(writer, lambda: writer._waiting is not None)
    add(writer, 2, best[1])
    writer.drain()
    assert store.written == [(written, True)]


def test_ends_with_an_error_if_the_last_one_cannot_be_written(
    store: FakeStore, writer: CheckpointWriter
) -> None:
    store.errors = [OSError(str(number)) for number in range(100)]
    add(writer, 1)
    with pytest.raises(ValueError, match=f"1: {ATTEMPTS - 1}"):
        writer.drain()
    store.errors = store.errors[: ATTEMPTS - 1]
    writer.drain()
    assert store.written == [(1, True)]


def test_ends_at_once_if_another_process_took_over(store: FakeStore, writer: CheckpointWriter) -> None:
    store.errors = [TakenOverError("was taken over")]
    add(writer, 1)
    with pytest.raises(TakenOverError):
        poll_until(writer, lambda: False)
