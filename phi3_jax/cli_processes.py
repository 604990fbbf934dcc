"""Commands that several processes run together: how they begin, and which of them speaks."""

import logging
import os
import sys
from typing import TYPE_CHECKING

from phi3_jax.allocator import keep_freed_memory

if TYPE_CHECKING:
    from jax.sharding import Mesh


def join(distributed: bool, *, preemption: bool = False) -> None:
    """Joins the other processes, if the user says that there are some; all but process 0 then keep quiet."""
    if not distributed:
        return
    from phi3_jax.distributed import is_primary, start

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
) -> "Mesh | None":
    """Before anything is computed: joins the other processes and builds the mesh that the user names.

    `preemption` as in `start`; `alone`: each process computes by itself, and the mesh is of its own devices.

    Raises:
        ValueError: a mesh that cannot be, or none where several processes need one.
    """
    keep_freed_memory()
    if mesh is None and not distributed:
        return None
    from phi3_jax.sharding import make_mesh, parse_mesh

    if mesh is not None:
        parse_mesh(mesh)  # a typing error is told before anyone is waited for
    join(distributed, preemption=preemption)
    import jax

    if mesh is not None:
        return make_mesh(mesh, jax.local_devices() if alone else None)
    if jax.process_count() > 1 and not alone:
        devices = jax.device_count()
        raise ValueError(
            f"--distributed has {devices} devices in {jax.process_count()} processes and needs --mesh to say "
            f"how they divide the model, as in --mesh fsdp={devices}"
        )
    return None


def speaks() -> bool:
    """Whether this process prints; without waking JAX where nothing has yet."""
    if "phi3_jax.distributed" not in sys.modules:
        return True
    from phi3_jax.distributed import is_primary

    return is_primary()


def tell(line: str) -> None:
    """A line for the user beside the output."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


def tell_error(error: BaseException) -> None:
    """What went wrong, told by process 0 and by the process that it went wrong in."""
    if (of := getattr(error, "of_process", None)) is not None:
        tell(f"phi3-jax: {error} (in process {of})" if of else f"phi3-jax: {error}")
        return
    where = ""
    if not speaks():
        from phi3_jax.distributed import process_index

        where = f" (process {process_index()})"
    print(f"phi3-jax{where}: {error}", file=sys.stderr)
