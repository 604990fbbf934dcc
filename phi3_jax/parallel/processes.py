"""Starts commands that several processes run together."""

import logging
import os
import sys

import jax
from jax.sharding import Mesh

from phi3_jax.errors import UserError
from phi3_jax.parallel.distributed import is_primary, start
from phi3_jax.parallel.sharding import make_mesh, parse_mesh
from phi3_jax.runs.allocator import keep_freed_memory


def join(distributed: bool, *, preemption: bool = False) -> None:
    """Joins the other processes if there are some; then only process 0 prints and logs."""
    if not distributed:
        return
    # Libraries such as Gloo print while processes connect; that must not mix with the answers.
    own = os.dup(1)
    os.dup2(2, 1)
    start(preemption=preemption)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    if not is_primary():
        sys.stdout.close()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the process ends
        logging.getLogger().setLevel(logging.ERROR)


def prepare(
    mesh: str | None, distributed: bool, *, preemption: bool = False, own_devices: bool = False
) -> Mesh | None:
    """Joins the other processes and builds the mesh of `--mesh`, before anything is computed.

    Args:
        preemption: as in `start`.
        own_devices: each process computes by itself, on a mesh of its own devices.

    Raises:
        UserError: the mesh is not valid, or there is none where several processes need one.
    """
    keep_freed_memory()
    if mesh is None and not distributed:
        return None
    if mesh is not None:
        parse_mesh(mesh)  # before waiting for others, so that typing errors appear at once
    join(distributed, preemption=preemption)
    if mesh is not None:
        return make_mesh(mesh, jax.local_devices() if own_devices else None)
    if jax.process_count() > 1 and not own_devices:
        devices = jax.device_count()
        raise UserError(
            f"--distributed has {devices} devices in {jax.process_count()} processes and needs --mesh to say "
            f"how they divide the model, as in --mesh fsdp={devices}"
        )
    return None
