"""The share of the time in which the device waits for its batch."""

import threading
import time
from typing import Any

import pytest
from phi3_jax.train import speed
from phi3_jax.train.speed import InputWait


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Step:
    """A result of a step that ends when the test says so."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def block_until_ready(self) -> None:
        assert self._ended.wait(timeout=20)

    def end(self, wait: InputWait) -> None:
        self._ended.set()
        while wait._step is None or wait._step.end is None:
            time.sleep(0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", clock)
    return clock


def take_step(
    wait: InputWait, clock: Clock, seconds: float, before: Step | None = None, at: float = 0
) -> Step:
    """Gets a batch in this time, within which the step before may end; returns the next step."""
    with wait.batch():
        clock.now += at
        if before is not None:
            before.end(wait)
        clock.now += seconds - at
    step: Any = Step()
    wait.after_step(step)
    return step


def test_counts_the_time_after_the_end_of_a_step(clock: Clock) -> None:
    wait = InputWait()
    assert wait.share() is None
    step = take_step(wait, clock, 5)  # the first batch does not count
    assert wait.share() is None
    clock.now += 1
    step.end(wait)
    step = take_step(wait, clock, 3)
    assert wait.share() == pytest.approx(3 / 4)
    step = take_step(wait, clock, 10, before=step, at=8)  # the step before ends after 8 of 10 seconds
    assert wait.share() == pytest.approx(2 / 10)
    before = step
    step = take_step(wait, clock, 4)  # and this one after the wait
    before._ended.set()
    clock.now += 1
    step.end(wait)
    wait.pause()
    clock.now += 100  # an evaluation
    step = take_step(wait, clock, 7)
    step.end(wait)
    assert wait.share() == 0
    step = take_step(wait, clock, 2)
    assert wait.share() == 1
    step.end(wait)


def test_the_thread_ends_with_its_owner() -> None:
    before = set(threading.enumerate())
    wait = InputWait()
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    del wait
    thread.join(timeout=20)
    assert not thread.is_alive()
