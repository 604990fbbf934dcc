"""Two sides measured in turns.

Each side runs in a process of its own and they take turns, so that neither's idle threads slow the other and
both see the same noise; ratios are taken turn by turn.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PAUSE = 0.5
"""Seconds before a turn, in which the other side's OpenMP threads stop spinning."""

Turn = Callable[[], Any]
"""One measurement; the first warms up."""
Sides = dict[str, tuple[Callable[[Any], Turn], Any]]
"""What makes ready to measure, and what it is given."""


def take_turns(sides: Sides, rounds: int) -> dict[str, list[Any]]:
    """What each turn of each side gave, every side in a process of its own, one after another."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    results: dict[str, list[Any]] = {name: [] for name in sides}
    try:
        for name, (side, work) in sides.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, side, work), daemon=True)
            process.start()
            there.close()
            workers[name] = (process, here)
            _ask(name, here)  # loaded, compiled and warm before the next one starts
        for _ in range(rounds):
            for name, (_, connection) in workers.items():
                time.sleep(PAUSE)
                connection.send("run")
                results[name].append(_ask(name, connection))
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=10)
            process.terminate()
    return results


def take_turns_here(sides: Sides, rounds: int) -> dict[str, list[Any]]:
    """In this process, which is one of several: they cannot each have others."""
    turns = {name: side(work) for name, (side, work) in sides.items()}
    for turn in turns.values():
        turn()
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, turn in turns.items():
            results[name].append(turn())
    return results


def _ask(name: str, connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures {name} died; is there enough memory?") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection, side: Callable[[Any], Turn], work: Any) -> None:
    """In a worker: gets ready, runs once to warm up, then once for each message."""
    try:
        turn = side(work)
        turn()
        connection.send("ready")
        while True:
            connection.recv()
            connection.send(turn())
    except EOFError:
        return
    except Exception as error:  # handed to the parent, which raises it
        connection.send(error)
