"""Commands that several processes run together: how they begin, and which of them speaks."""

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
    """Joins the other processes, if the user says that there are some; all but process 0 then keep quiet."""
    if not distributed:
        return
    # What libraries print while processes connect (Gloo does) must not mix with the answers.
    own = os.dup(1)
    os.dup2(2, 1)
    start(preemption=preemption)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    if not is_primary():
        sys.stdout.close()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
        logging.getLogger().setLevel(logging.ERROR)


def prepare(
    mesh: str | None, distributed: bool, *, preemption: bool = False, alone: bool = False
) -> Mesh | None:
    """Before anything is computed: joins the other processes and builds the mesh that the user names.

    `preemption` as in `start`; `alone`: each process computes by itself, and the mesh is of its own devices.

    Raises:
        ValueError: a mesh that cannot be, or none where several processes need one.
    """
    keep_freed_memory()
    if mesh is None and not distributed:
        return None
    if mesh is not None:
        parse_mesh(mesh)  # a typing error is told before anyone is waited for
    join(distributed, preemption=preemption)
    if mesh is not None:
        return make_mesh(mesh, jax.local_devices() if alone else None)
    if jax.process_count() > 1 and not alone:
        devices = jax.device_count()
        raise UserError(
            f"--distributed has {devices} devices in {jax.process_count()} processes and needs --mesh to say "
            f"how they divide the model, as in --mesh fsdp={devices}"
        )
    return None
