"""Which accelerators a command lets JAX look for."""

import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
from glob import glob


def skip_absent_tpu() -> None:
    """Keeps JAX from loading libtpu where it is installed but no TPU is: it would complain of that at length.

    Other accelerators remain. Does nothing where the user has set JAX_PLATFORMS. For commands, before JAX
    looks for devices; processes that they start inherit it.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None or has_tpu():
        return
    plugins = _plugins()
    if not all(name.startswith("xla_cuda") for name in plugins):
        return  # a plugin of unknown platforms: they can only be found by JAX itself
    platforms = "cuda,cpu" if plugins else "cpu"  # JAX passes over cuda where no GPU is visible
    if "jax" in sys.modules:
        import jax

        if jax.config.jax_platforms is not None:  # type: ignore[attr-defined]  # set at run time
            return
        jax.config.update("jax_platforms", platforms)
    os.environ["JAX_PLATFORMS"] = platforms


def has_tpu() -> bool:
    """Whether the kernel offers devices by which libtpu reaches TPUs."""
    return bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"))


def _plugins() -> set[str]:
    """Names of the plugins that bring JAX further platforms."""
    found = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    package = importlib.util.find_spec("jax_plugins")
    if package is not None and package.submodule_search_locations is not None:
        found |= {module.name for module in pkgutil.iter_modules(list(package.submodule_search_locations))}
    return found
