"""Fixtures for every test."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from answers import ANSWERS, MODES

# Eight devices to divide models over. Accelerators are used where a user names them in JAX_PLATFORMS.
jax.config.update("jax_num_cpu_devices", 8)
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile programs with all optimizations, as users do; this takes several times as long",
    )
    parser.addoption(
        "--reference",
        choices=MODES,
        default="stored",
        help="stored: compare with stored answers of transformers; live: run transformers, and compare its "
        "answers with the stored ones; remake: run transformers, and store its answers",
    )


def pytest_configure(config: pytest.Config) -> None:
    ANSWERS.mode = config.getoption("reference")
    if ANSWERS.mode == "remake" and config.getoption("numprocesses", None):
        raise pytest.UsageError("--reference remake writes files from one process; leave out -n")
    # Workers and later runs share compiled programs; `pytest --cache-clear` removes them.
    assert config.cache is not None
    _set_jax("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    _set_jax("jax_persistent_cache_min_compile_time_secs", 0.0)
    _set_jax("jax_persistent_cache_min_entry_size_bytes", -1)
    # All processes of the tests share one library in C++; without a compiler, there is none.
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        os.environ["PHI3_JAX_NATIVE"] = "0"
    os.environ.setdefault("PHI3_JAX_NATIVE", str(config.cache.mkdir("native")))
    if not config.getoption("optimize"):
        _set_jax("jax_disable_most_optimizations", True)
        flags = ["--xla_cpu_parallel_codegen_split_count=1"]
        if jax.version.__version_info__ < (0, 11):
            flags.append("--xla_cpu_use_fusion_emitters=false")  # halves compilation; newer XLA lacks it
        # Workers inherit the flags. A repeated flag would change the keys of the compilation cache.
        flags += os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(flags))
    gc.set_threshold(200_000, 50, 50)  # tracing makes many small objects, and collection took 7 % of the time


def _set_jax(option: str, value: str | float | bool) -> None:
    """Sets an option of JAX here and in the processes that tests start."""
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked `live` without `--reference live`."""
    if ANSWERS.mode != "live":
        live = [item for item in items if item.get_closest_marker("live")]
        items[:] = [item for item in items if item not in set(live)]
        config.hook.pytest_deselected(items=live)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets slow tests ask the reference in every mode."""
    ANSWERS.bypass = item.get_closest_marker("slow") is not None


def pytest_sessionfinish() -> None:
    if ANSWERS.mode == "remake":
        ANSWERS.write()


MOST_MEMORY_MAPS = 40_000
"""With more maps, a module's compiled programs are dropped after it; Linux gives a process 65,530."""


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory_maps() -> Iterator[None]:
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Callable[..., Path]:
    """Returns a function that finds a path in the test data, and skips the test if the path is absent."""
    beside_repository = Path(__file__).parents[1] / ".." / "shared" / "data"
    root = Path(os.environ.get("PHI3_JAX_TEST_DATA") or beside_repository)

    def find(*parts: str) -> Path:
        path = root.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"test data {'/'.join(parts)} is absent; PHI3_JAX_TEST_DATA names its folder")
        return path

    return find


@pytest.fixture(scope="module")
def torch_threads() -> Iterator[None]:
    """Gives PyTorch this worker's share of the cores, which real models need."""
    import torch

    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(before)
