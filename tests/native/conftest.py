"""The C++ library for tests of it."""

import ctypes

import pytest

from phi3_jax.native.library import load_library
from phi3_jax.native.targets import available


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """Returns the library that all tests share."""
    if not available():
        pytest.skip("the C++ library is not available: a warning says why, or PHI3_JAX_NATIVE is 0")
    return load_library()
