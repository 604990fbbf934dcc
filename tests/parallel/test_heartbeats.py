"""Processes that lose another one end with a line, and blame nobody who only was slow or is done."""

import platform
from collections.abc import Iterable

import pytest

from phi3_jax.parallel.heartbeats import SILENT_BEATS, Heartbeats


class Texts:
    """The texts of process 0, which may be gone."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.gone = False

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        if self.gone:
            raise RuntimeError("UNAVAILABLE: Socket closed")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [item for item in self.values.items() if item[0].startswith(key)]


class Processes:
    """Three processes, and the lines with which they end."""

    def __init__(self) -> None:
        self.texts = Texts()
        self.lines: dict[int, list[str]] = {0: [], 1: [], 2: []}
        self.beats = [Heartbeats(self.texts, each, 3, self.lines[each].append, 0.0) for each in range(3)]

    def live(self, alive: Iterable[int], beats: int) -> None:
        """Lets these processes beat so often."""
        for _ in range(beats):
            for each in alive:
                self.beats[each].watch()
                self.beats[each].beat()

    @property
    def ended(self) -> list[int]:
        return [each for each, lines in self.lines.items() if lines]


@pytest.fixture
def processes() -> Processes:
    return Processes()


def test_nobody_ends_while_all_beat(processes: Processes) -> None:
    processes.live(range(3), 3 * SILENT_BEATS)
    assert not processes.ended
    assert len(processes.texts.values) == 3


def test_the_others_end_after_one_is_silent(processes: Processes) -> None:
    processes.live(range(3), 4)
    processes.live([0, 2], SILENT_BEATS - 1)
    assert not processes.ended
    processes.live([0, 2], 2)
    assert processes.ended == [0, 2]
    assert processes.lines[2][0].startswith("process 1 on ")
    assert "no sign of life" in processes.lines[2][0]
    assert "exit code 75" in processes.lines[2][0]


def test_one_that_is_slow_is_not_lost(processes: Processes) -> None:
    for _ in range(4):
        processes.live([0, 2], SILENT_BEATS - 2)
        processes.live(range(3), 1)
    assert not processes.ended


def test_one_that_slept_blames_nobody(processes: Processes) -> None:
    """The clock of process 0 stood still, or its machine was moved."""
    processes.live([1, 2], SILENT_BEATS - 2)
    processes.live([0], 1)
    assert not processes.ended


def test_one_that_never_beat_is_lost_too(processes: Processes) -> None:
    processes.live([0, 1], SILENT_BEATS)
    assert processes.ended == [0, 1]
    assert processes.lines[0][0].startswith("process 2 has")


def test_nobody_misses_one_that_is_done(processes: Processes) -> None:
    processes.live(range(3), 2)
    processes.beats[1].stop()
    processes.live([0, 2], 3 * SILENT_BEATS)
    assert not processes.ended


def test_the_others_end_without_process_0(processes: Processes) -> None:
    processes.live(range(3), 2)
    processes.texts.gone = True
    processes.live([1, 2], SILENT_BEATS)
    assert not processes.ended
    processes.live([1, 2], 1)
    assert processes.ended == [1, 2]
    assert processes.lines[1][0].startswith("process 0 has given no sign")


def test_stops_where_process_0_is_gone(processes: Processes) -> None:
    processes.texts.gone = True
    processes.beats[1].stop()


def test_a_machine_that_dies_at_once_is_named(processes: Processes) -> None:
    quiet = Heartbeats(processes.texts, 2, 3, print, 1000.0)
    quiet.start()
    processes.live([0, 1], SILENT_BEATS + 1)
    quiet.stop()
    assert processes.ended == [0, 1]
    assert processes.lines[0][0].startswith(f"process 2 on {platform.node()} has")
