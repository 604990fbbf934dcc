"""Measures the sides of a comparison in turns.

Each side runs in a process of its own, and the processes take turns: idle threads of one do not slow down the
other, and noise affects both alike. Ratios are computed turn by turn.
"""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError

PAUSE = 0.5
"""The seconds before a turn, in which the OpenMP threads of the other sides stop spinning."""

Turn = Callable[[], Any]
"""One measurement; the first call warms up."""

MakeTurn = Callable[[Any], Turn]
"""Loads everything that a side needs for the given options, and returns its turn."""

Sides = dict[str, tuple[MakeTurn, Any]]
"""The names of the sides, each with its `MakeTurn` and options."""


PEERS = {"transformers": ("torch", "transformers"), "llama.cpp": ("llama_cpp",)}
"""The modules of each program that phi3-jax is compared with."""


def choose_peer(peer: str | None, model: Path) -> str | None:
    """Returns the peer to compare with: transformers by default, if it is installed and has such a model.

    Raises:
        UserError: there is no such peer, it is not installed, or it has no such model.
    """
    name = "transformers" if peer is None else peer
    if name not in PEERS:
        raise UserError(f"peer {name!r} is not known; use {' or '.join(PEERS)}")
    model_type = open_checkpoint(model).config.model_type
    if model_type != Phi3Config.model_type:
        if peer is None:
            return None
        raise UserError(f"{name} has no model of model_type {model_type!r}; leave out --peer")
    if all(importlib.util.find_spec(module) for module in PEERS[name]):
        return name
    if peer is None:
        return None
    package = "llama-cpp-python" if name == "llama.cpp" else " ".join(PEERS[name])
    raise UserError(f"{name} is not installed (pip install {package})")


def take_turns(sides: Sides, rounds: int) -> dict[str, list[Any]]:
    """Returns the results of each side's turns; every side runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    results: dict[str, list[Any]] = {name: [] for name in sides}
    try:
        for name, (make_turn, options) in sides.items():
            connection, worker_connection = context.Pipe()
            process = context.Process(
                target=_serve, args=(worker_connection, make_turn, options), daemon=True
            )
            process.start()
            worker_connection.close()
            workers[name] = (process, connection)
            _receive(name, connection)  # loaded, compiled and warmed up before the next one starts
        for _ in range(rounds):
            for name, (_, connection) in workers.items():
                time.sleep(PAUSE)
                connection.send("run")
                results[name].append(_receive(name, connection))
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=10)
            process.terminate()
    return results


def take_turns_here(sides: Sides, rounds: int) -> dict[str, list[Any]]:
    """Like `take_turns`, but in this process, for runs of several processes."""
    turns = {name: make_turn(options) for name, (make_turn, options) in sides.items()}
    for turn in turns.values():
        turn()
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, turn in turns.items():
            results[name].append(turn())
    return results


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the median of the ratios of the turns' seconds; above 1, ours is faster."""
    return f"{statistics.median(other / mine for mine, other in zip(ours, theirs, strict=True)):.2f}"


def _receive(name: str, connection: Connection) -> Any:
    try:
        result = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures {name} died; is there enough memory?") from None
    if isinstance(result, Exception):
        raise result
    return result


def _serve(connection: Connection, make_turn: MakeTurn, options: Any) -> None:
    """Runs in the worker process: a first turn to warm up, then one turn for each message."""
    try:
        turn = make_turn(options)
        turn()
        connection.send("ready")
        while True:
            connection.recv()
            connection.send(turn())
    except EOFError:
        return
    except Exception as error:  # the parent process raises it
        connection.send(error)
