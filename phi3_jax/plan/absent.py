"""Devices that are not here, to compile for: libtpu describes a slice and compiles for it on any machine."""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from phi3_jax.costs.chips import Topology
from phi3_jax.errors import UserError

# Without these libtpu waits minutes for a metadata server that is not there, and lets one process at a time
# load it.
_NEEDED = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# libtpu looks for the machine's TPU when it is loaded, and reports the absence of these variables on standard
# error. With any values that it knows it is content; nothing here depends on them.
_QUIET = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def _set_defaults(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def keep_to_the_compiler() -> None:
    """For a process that only plans: take no accelerator of this machine, and keep libtpu quiet.

    To be called before JAX has touched a device.
    """
    _set_defaults(_NEEDED | _QUIET)
    jax.config.update("jax_platforms", "cpu")


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Turns JAX's persistent cache off: it writes programs for absent devices and cannot read them."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # set at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def absent_devices(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU slice that need not exist, for a mesh to compile for.

    Raises:
        ValueError: libtpu is not installed, or does not know this slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(f"compiling for {topology.name} needs libtpu; run pip install 'phi3-jax[tpu]'")
    _set_defaults(_NEEDED)
    options: dict[str, Any] = dict(topology.chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # some versions of libtpu take 2 x 2 for granted
    try:
        found = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"libtpu cannot describe the topology {topology.name}: {first_line}") from error
    if len(found.devices) != topology.devices:
        raise UserError(
            f"libtpu gives {topology.name} {len(found.devices)} devices, not {topology.devices}; "
            "this version of it is not one that plans were made with"
        )
    return found.devices
