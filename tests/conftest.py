"""Fixtures for every test."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
import torch

# Eight devices to divide models over. Accelerators are used where a user names them in JAX_PLATFORMS.
jax.config.update("jax_num_cpu_devices", 8)
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")

# Small models are several times faster on one thread than on two that wait for each other.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Without the slow tests, programs are compiled in two thirds of the time, and not optimised to the last.

    The slow ones, real models among them, run what users run.
    """
    if config.getoption("markexpr") == "not slow":
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go() -> Iterator[None]:
    """Compiled programs hold memory maps, and a process may have 65,530: fewer than all tests need."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Callable[..., Path]:
    """`shared_data("phi3-configs")`: that path among the test data, or a skip where it is absent."""
    beside_repository = Path(__file__).parents[1] / ".." / "shared" / "data"
    root = Path(os.environ.get("PHI3_JAX_TEST_DATA") or beside_repository)

    def find(*parts: str) -> Path:
        path = root.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"test data {'/'.join(parts)} is absent; PHI3_JAX_TEST_DATA names its folder")
        return path

    return find
