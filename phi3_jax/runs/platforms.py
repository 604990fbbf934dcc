"""Selects the accelerators that a command lets JAX look for."""

import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
from glob import glob


def skip_absent_tpu() -> None:
    """Keeps JAX from loading libtpu if there is no TPU, since libtpu would print long warnings.

    Other accelerators remain. Does nothing if the user has set JAX_PLATFORMS. Commands call it before JAX
    looks for devices; the processes that they start inherit it.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None or has_tpu():
        return
    plugins = _plugins()
    if not all(name.startswith("xla_cuda") for name in plugins):
        return  # only JAX itself can find the platforms of other plugins
    platforms = "cuda,cpu" if plugins else "cpu"  # JAX skips cuda if no GPU is visible
    if "jax" in sys.modules:
        import jax

        if jax.config.jax_platforms is not None:  # type: ignore[attr-defined]  # set at run time
            return
        jax.config.update("jax_platforms", platforms)
    os.environ["JAX_PLATFORMS"] = platforms


def has_tpu() -> bool:
    """Returns whether the kernel has devices through which libtpu reaches TPUs."""
    return bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"))


def _plugins() -> set[str]:
    """Returns the names of the plugins that add platforms to JAX."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    package = importlib.util.find_spec("jax_plugins")
    if package is not None and package.submodule_search_locations is not None:
        names |= {module.name for module in pkgutil.iter_modules(list(package.submodule_search_locations))}
    return names
