"""What the C library does with memory that a computation gives back."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
"""Parameters of glibc's `mallopt`, from its malloc.h."""


def keep_freed_memory() -> None:
    """Keeps memory in the process that computations on CPU give back, until the process ends.

    XLA allocates what a program needs anew each time it runs; glibc maps it from the kernel, which zeroes it
    page by page, and unmaps it afterwards: a fifth of the time of a training step. One arena, since the
    others cannot hold large blocks, and map them all the same.

    Does nothing where JAX may find an accelerator, and with other C libraries. To be called before JAX begins
    to compute, whose threads would take arenas of their own; by commands, not libraries: it is for the whole
    process.
    """
    if not sys.platform.startswith("linux") or not _on_cpu():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _on_cpu() -> bool:
    """Whether JAX will compute on the CPU, as far as can be told without waking it."""
    if named := os.environ.get("JAX_PLATFORMS"):
        return named == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
