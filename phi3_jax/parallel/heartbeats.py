"""Signs of life that the processes of a run give each other, so that all end soon after one is lost.

A step never returns where a process is missing. JAX notices that after 100 seconds, and then aborts with many
lines of C++, from which neither a person nor a launcher learns much.
"""

import atexit
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any, Protocol

BEAT_SECONDS = 5.0
"""The time between two signs of life."""

SILENT_BEATS = 12
"""How many beats a process may miss, as in a long call that keeps Python's other threads from running."""

LOST_PROCESS = os.EX_TEMPFAIL
"""The exit code of a process that another one left alone: the same command may succeed later."""

_FOLDER = "phi3_jax/heartbeats"
_DONE = "done"


class Store(Protocol):
    """What JAX's distributed client has: texts by key, which all processes see."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Heartbeats:
    """Two threads: one writes this process's beats and reads those of the others, one watches the first.

    Beats are counted by this process's own, not by a clock, so that one that slept a while blames nobody.

    Args:
        store: in process 0.
        index: the number of this process.
        count: of the processes.
        lost: is called with a line for the user when a process is lost; it ends this one.
        seconds: between two beats.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        lost: Callable[[str], Any],
        seconds: float = BEAT_SECONDS,
    ):
        self._store, self._index, self._lost, self._seconds = store, index, lost, seconds
        self._ended = Event()
        self._beats = {number: "" for number in range(count) if number != index}
        self._missed = dict.fromkeys(self._beats, 0)
        self._missed_answers = self._own = 0

    def start(self) -> None:
        """Beats once, so that the others know this machine's name, and starts the threads."""
        self._write_beat()
        for work in (self.beat, self.watch):
            Thread(target=self._repeat, args=[work], name="heartbeats", daemon=True).start()

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._ended.wait(self._seconds):
            work()

    def stop(self) -> None:
        """Ends the threads, and tells the others that this process is done."""
        self._ended.set()
        with suppress(RuntimeError):  # process 0 has ended before
            self._set(_DONE)

    def wait(self) -> None:
        """Waits as long as a process may be silent."""
        self._ended.wait((SILENT_BEATS + 3) * self._seconds)

    def beat(self) -> None:
        """Writes a beat, and reads those of the others."""
        self._own += 1
        try:
            self._write_beat()
            found = self._store.key_value_dir_get(_FOLDER)
        except RuntimeError:  # `watch` counts
            return
        self._missed_answers = 0
        beats = {int(key.rpartition("/")[2]): value for key, value in found}
        for number, before in self._beats.items():
            now = self._beats[number] = beats.get(number, "")
            self._missed[number] = 0 if now != before or now == _DONE else self._missed[number] + 1
            if self._missed[number] == SILENT_BEATS:
                self._end(number, now.partition(" on ")[2])

    def watch(self) -> None:
        """Counts the beats that process 0 has not answered, whether it is gone or hangs."""
        self._missed_answers += 1
        if self._missed_answers > SILENT_BEATS:
            self._end(0, "")

    def _write_beat(self) -> None:
        self._set(f"{self._own} on {platform.node()}")

    def _set(self, value: str) -> None:
        self._store.key_value_set(f"{_FOLDER}/{self._index}", value, allow_overwrite=True)

    def _end(self, number: int, machine: str) -> None:
        if self._index == 0:  # without process 0 the others could not say what they know
            self._ended.wait(2 * self._seconds)
        where = f" on {machine}" if machine else ""
        seconds = SILENT_BEATS * self._seconds
        self._lost(
            f"process {number}{where} has given no sign of life for {seconds:.0f} seconds; this process ends "
            f"with exit code {LOST_PROCESS}. The same command resumes what was saved"
        )


def watch_other_processes(index: int, count: int) -> None:
    """Ends this process, with a line that says why, after another one has died or hung for a minute.

    JAX's distributed service must have been started.
    """
    from jax._src.distributed import global_state  # no public name leads to the client, as in Orbax

    def end(line: str) -> None:
        print(f"phi3-jax (process {index}): {line}", file=sys.stderr, flush=True)
        os._exit(LOST_PROCESS)  # nothing can be waited for

    assert global_state.client is not None
    heartbeats = Heartbeats(global_state.client, index, count, end)
    heartbeats.start()
    _started.append(heartbeats)
    atexit.register(heartbeats.stop)  # before JAX waits for the others


_started: list[Heartbeats] = []
"""Those of this process, if there are others."""


def wait_for_lost_process() -> None:
    """Waits until another process can be known to be lost, which ends this one; returns if none is.

    A step may fail at once where a connection breaks, with an error that does not tell why.
    """
    for heartbeats in _started:
        heartbeats.wait()
