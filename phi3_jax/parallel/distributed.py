"""Starts several processes that run the same program, and lets process 0 decide and write."""

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi3_jax.errors import UserError
from phi3_jax.parallel.heartbeats import watch_other_processes
from phi3_jax.sizes import power_of_two

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables for processes that no scheduler started. JAX reads the first, `start` the others."""

SHUTDOWN_SECONDS = 60
"""How long a finished process waits for the others; if one of them hangs, all end after that."""

SHORT = 256
"""Bytes of a message: all but long texts fit, so that one program sends nearly everything."""


def start(timeout: int = 300, *, preemption: bool = False) -> None:
    """Joins the other processes of this process's cluster; call it before JAX is used.

    JAX recognises Cloud TPU, GKE (xpk too), SLURM, Open MPI and Kubernetes by their variables. Elsewhere give
    every process JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    A process that loses another one ends by itself (see `Heartbeats`).

    Args:
        timeout: seconds to wait for the others.
        preemption: a SIGTERM in one process does not end it; all processes notice it at the same step
            (`multihost_utils.reached_preemption_sync_point`) and can save their state first.

    Raises:
        UserError: there is no cluster, or the variables are wrong.
        ConnectionError: processes are missing, or JAX has already started to compute.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    count, process = _number(given, VARIABLES[1]), _number(given, VARIABLES[2])
    if len(given) == len(VARIABLES) and ":" not in given[VARIABLES[0]]:
        raise UserError(f"{VARIABLES[0]}={given[VARIABLES[0]]!r} lacks the port; expected host:port")
    if count is not None and process is not None and not 0 <= process < count:
        raise UserError(f"{VARIABLES[2]}={process} is not one of {VARIABLES[1]}={count} processes, from 0 on")
    jax.config.update("jax_enable_preemption_service", preemption)  # it keeps SIGTERM from ending the process
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=process,
            # Otherwise SLURM's or Open MPI's variables would choose the devices of a run that is not theirs.
            cluster_detection_method="deactivate" if len(given) == len(VARIABLES) else None,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        names = " and ".join(given) or "none of them"
        raise UserError(
            f"no cluster was found ({error}): expected Cloud TPU, GKE, SLURM or Open MPI, or the variables "
            f"{', '.join(VARIABLES)} ({names} given)"
        ) from error
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ConnectionError(f"cannot join the other processes: {first}") from error
    watch_other_processes(jax.process_index(), jax.process_count())
    broadcast(None)  # Gloo connects with the first message, and does not wait long for a busy process


def _number(given: dict[str, str], name: str) -> int | None:
    try:
        return int(given[name]) if name in given else None
    except ValueError:
        raise UserError(f"{name}={given[name]!r} is not a number") from None


def process_index() -> int:
    """Returns the number of this process: 0 if it is the only one, without initialising JAX's devices."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """Returns the number of processes, without initialising JAX's devices if there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Returns whether this is the process that prints and writes."""
    return process_index() == 0


def spans_processes(mesh: Mesh | None) -> bool:
    """Returns whether `mesh` has devices of several processes, which must all run the same programs."""
    return mesh is not None and mesh.is_multi_process


def from_primary(work: Callable[[], T]) -> T:
    """Runs `work` in process 0 alone and returns its result, or raises its error, in every process.

    Every process must call this. The result must pickle.
    """
    if process_count() == 1:
        return work()
    if not is_primary():
        value, error = broadcast(None)
        if error is not None:
            error.of_process = 0
            raise error
        return value
    try:
        value = work()
        pickle.dumps(value)  # an error must come before the broadcast
    except BaseException as error:  # Ctrl-C as well: the others wait
        broadcast((None, portable(error)))
        raise
    broadcast((value, None))
    return value


def from_primary_on(mesh: Mesh | None, work: Callable[[], T]) -> T:
    """Runs `work` as `from_primary` does if `mesh` spans processes; otherwise in this process."""
    return from_primary(work) if spans_processes(mesh) else work()


def run_everywhere(work: Callable[[], T]) -> T:
    """Runs `work` in every process; returns this one's result, or raises the first error in all.

    `work` may call this itself, but not wait for other processes in other ways.
    """
    if process_count() == 1:
        return work()
    own: BaseException | None = None
    try:
        result = work()
    except BaseException as error:
        if getattr(error, "everywhere", False):
            raise
        own = error
    flags = np.zeros(process_count(), np.uint8)
    flags[process_index()] = own is not None
    failed = np.flatnonzero(_sum(flags))
    if not failed.size:
        return result
    theirs = broadcast(own and portable(own), source=int(failed[0]))
    if own is not None:
        own.everywhere = True  # type: ignore[attr-defined]
        raise own
    theirs.of_process = int(failed[0])
    theirs.everywhere = True
    raise theirs


def broadcast(value: Any, source: int = 0) -> Any:
    """Returns the value of process `source` in every process, by one message or, if it is long, two."""
    own = process_index() == source
    data = pickle.dumps(value) if own else b""
    head = np.zeros(SHORT, np.uint8)
    if own:
        first = len(data).to_bytes(8, "little") + data[: SHORT - 8]
        head[: len(first)] = np.frombuffer(first, np.uint8)
    head = _sum(head)
    length = int.from_bytes(head[:8].tobytes(), "little")
    if length <= SHORT - 8:
        return pickle.loads(head[8 : 8 + length].tobytes())
    # Powers of two, so that few programs are compiled.
    body = np.zeros(power_of_two(length), np.uint8)
    body[: len(data)] = np.frombuffer(data, np.uint8)  # empty in the other processes
    body = _sum(body)
    return pickle.loads(body[:length].tobytes())


def _sum(own: np.ndarray) -> np.ndarray:
    """Returns the sum of the processes' arrays, which have the same shape and type.

    It waits for all devices of this process; the functions of `multihost_utils` wait for one. A device that
    is still connecting when the other processes end would keep this process from ending.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.reshape(devices, (process_count(), -1)), ("process", "device"))
    rows = multihost_utils.host_local_array_to_global_array(own[None], mesh, PartitionSpec("process"))
    total = jax.jit(_sum_of_rows, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    return np.asarray(jax.block_until_ready(total).addressable_data(0))


def _sum_of_rows(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows, axis=0, dtype=rows.dtype)


def portable(error: BaseException) -> BaseException:
    """Returns the error, or one with its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
