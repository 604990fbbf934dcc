"""The functions of the C++ library, known to XLA by name."""

import ctypes
import functools
import logging
import threading

import jax

from phi3_jax.native.library import VARIABLE, UnavailableError, is_wanted, load_library

logger = logging.getLogger(__name__)

PRODUCT, ATTENTION, WRITE = "phi3_jax_product", "phi3_jax_attention", "phi3_jax_write"
"""The names of the custom calls in a program."""

_lock = threading.Lock()


def available() -> bool:
    """Whether programs can call the library; builds and loads it if necessary, once in a process.

    False on a machine with an accelerator, whose programs for the CPU use XLA, and if PHI3_JAX_NATIVE=0. If
    the library cannot be built or loaded, one warning says why.
    """
    with _lock:
        return _library() is not None


def variant() -> str | None:
    """Returns the name of the instructions that the library uses here; None if it is not available."""
    if not available():
        return None
    library = _library()
    assert library is not None
    library.phi3_jax_variant.restype = ctypes.c_char_p
    return library.phi3_jax_variant().decode()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not is_wanted() or jax.default_backend() != "cpu":
        return None
    try:
        library = load_library()
    except UnavailableError as error:
        logger.warning("products are slower, by XLA: %s (%s=0 is silent)", error, VARIABLE)
        return None
    for name in (PRODUCT, ATTENTION, WRITE):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library
