"""Absent devices as compilation targets: libtpu describes a slice and compiles for it on any machine."""

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

# Without these variables libtpu waits minutes for an absent metadata server, and only one process at a time
# can load it.
_NEEDED = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# libtpu looks for the machine's TPU when it is loaded, and complains on standard error if these variables are
# not set. Any values that it knows will do; nothing here depends on them.
_QUIET = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def _set_defaults(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def keep_to_the_compiler() -> None:
    """Makes this process use no accelerator of the machine and keeps libtpu quiet, for planning only.

    Call it before JAX touches a device.
    """
    _set_defaults(_NEEDED | _QUIET)
    jax.config.update("jax_platforms", "cpu")


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Turns JAX's persistent cache off, which writes programs for absent devices and cannot read them."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # set at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def absent_devices(topology: Topology) -> Sequence[Any]:
    """Returns the devices of a TPU slice, which need not exist, for a mesh to compile for.

    Raises:
        UserError: libtpu is not installed, or does not know this slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(f"compiling for {topology.name} needs libtpu; run pip install 'phi3-jax[tpu]'")
    _set_defaults(_NEEDED)
    options: dict[str, Any] = dict(topology.chip.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # some versions of libtpu assume 2 x 2
    try:
        description = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"libtpu cannot describe the topology {topology.name}: {first_line}") from error
    if len(description.devices) != topology.devices:
        raise UserError(
            f"libtpu gives {topology.name} {len(description.devices)} devices, not {topology.devices}; "
            "plans were not tested with this version of libtpu"
        )
    return description.devices
