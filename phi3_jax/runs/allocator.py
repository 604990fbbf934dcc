"""Keeps freed memory in the process, by settings of the C library."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
"""Parameters of glibc's `mallopt`, from malloc.h."""


def keep_freed_memory() -> None:
    """Keeps the memory of finished computations on CPU in the process until it ends.

    XLA allocates memory each time a program runs; glibc maps it from the kernel, which zeroes every page, and
    unmaps it afterwards. That is a fifth of the time of a training step. There is one arena, because the
    others cannot hold large blocks and would map them.

    Does nothing if JAX may find an accelerator, or with other C libraries. Call it before JAX starts to
    compute, since JAX's threads would create their own arenas, and only in commands: it affects the whole
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
    """Returns whether JAX will probably compute on the CPU, without initialising it."""
    if named := os.environ.get("JAX_PLATFORMS"):
        return named == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
