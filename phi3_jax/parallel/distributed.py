"""Several processes that run the same program: starting them, and letting process 0 decide and write."""

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

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Of a run that no scheduler started. The first is JAX's own, the others are read here."""

SHUTDOWN_SECONDS = 60
"""How long a process that is done waits for the others; if one of them hangs, all end after that."""

SHORT = 256
"""Bytes of what is sent at once: all but long texts fit, so that one program sends nearly everything."""


def start(timeout: int = 300, *, preemption: bool = False) -> None:
    """Joins the processes of the cluster that this one runs in, before anything else is asked of JAX.

    Cloud TPU, GKE (xpk too), SLURM, Open MPI and Kubernetes are known to JAX by what they set; elsewhere
    give every process JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        timeout: seconds to wait for the others.
        preemption: a SIGTERM in any process does not end it, but is noticed by all of them at the same step
            (`multihost_utils.reached_preemption_sync_point`), for a run that saves itself first.

    Raises:
        ValueError: there is no cluster, or the variables are wrong.
        ConnectionError: processes are missing, or JAX has begun to compute already.
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
            # Without this, what SLURM or the like says of devices is applied to a run that is not theirs.
            cluster_detection_method="deactivate" if len(given) == len(VARIABLES) else None,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        found = " and ".join(given) or "none of them"
        raise UserError(
            f"no cluster was found ({error}): expected Cloud TPU, GKE, SLURM or Open MPI, or the variables "
            f"{', '.join(VARIABLES)} ({found} given)"
        ) from error
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ConnectionError(f"cannot join the other processes: {first}") from error
    broadcast(None)  # Gloo connects with the first message, and does not wait long for a process that is busy


def _number(given: dict[str, str], name: str) -> int | None:
    try:
        return int(given[name]) if name in given else None
    except ValueError:
        raise UserError(f"{name}={given[name]!r} is not a number") from None


def process_index() -> int:
    """This process's number; 0 where there is one only, without waking JAX's devices."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Whether this is the process that prints and writes."""
    return process_index() == 0


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether what is computed on `mesh` takes several processes, which must then do the same."""
    return mesh is not None and mesh.is_multi_process


def from_primary(work: Callable[[], T]) -> T:
    """What `work` gives in process 0, which alone does it; an error there is raised in every process.

    Every process must come here. What is given must pickle.
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
        pickle.dumps(value)  # while the others can still hear of it
    except BaseException as error:  # Ctrl-C as well: the others wait
        broadcast((None, portable(error)))
        raise
    broadcast((value, None))
    return value


def agreed(mesh: Mesh | None, work: Callable[[], T]) -> T:
    """`from_primary` where `mesh` takes several processes; elsewhere each does its own work."""
    return from_primary(work) if spans_processes(mesh) else work()


def together(work: Callable[[], T]) -> T:
    """What `work` gives here, once every process has done its own; an error in one is raised in all.

    `work` must not wait for other processes itself.
    """
    if process_count() == 1:
        return work()
    own: BaseException | None = None
    try:
        made = work()
    except BaseException as error:
        own = error
    flags = np.zeros(process_count(), np.uint8)
    flags[process_index()] = own is not None
    failed = np.flatnonzero(_sum(flags))
    if not failed.size:
        return made
    theirs = broadcast(own and portable(own), source=int(failed[0]))
    if own is not None:
        raise own
    theirs.of_process = int(failed[0])
    raise theirs


def broadcast(value: Any, source: int = 0) -> Any:
    """The value of process `source`, in every process; small ones take one message, long ones two."""
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
    # In powers of two, so that few programs are compiled.
    body = np.zeros(1 << (length - 1).bit_length(), np.uint8)
    body[: len(data)] = np.frombuffer(data, np.uint8)  # nothing, in the other processes
    body = _sum(body)
    return pickle.loads(body[:length].tobytes())


def _sum(own: np.ndarray) -> np.ndarray:
    """The sum of the processes' arrays, which have one shape and type.

    It waits for all devices of this process, where the functions of `multihost_utils` wait for one: a device
    that still connects to the others when their processes end would keep this process from ending.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.reshape(devices, (process_count(), -1)), ("process", "device"))
    rows = multihost_utils.host_local_array_to_global_array(own[None], mesh, PartitionSpec("process"))
    total = jax.jit(_sum_of_rows, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    return np.asarray(jax.block_until_ready(total).addressable_data(0))


def _sum_of_rows(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows, axis=0, dtype=rows.dtype)


def portable(error: BaseException) -> BaseException:
    """The error, or its text where it cannot go to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
