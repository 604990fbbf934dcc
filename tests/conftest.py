"""Fixtures for every test."""

import gc
import os
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
        help="compile programs as users' programs are compiled, which takes several times as long",
    )
    parser.addoption(
        "--reference",
        choices=MODES,
        default="stored",
        help="stored: compare with stored answers of transformers; live: run it, and compare its answers "
        "with the stored ones; remake: run it, and store its answers",
    )


def pytest_configure(config: pytest.Config) -> None:
    ANSWERS.mode = config.getoption("reference")
    if ANSWERS.mode == "remake" and config.getoption("numprocesses", None):
        raise pytest.UsageError("--reference remake writes files from one process; leave out -n")
    # Workers share compiled programs, and later runs find them again; `pytest --cache-clear` removes them.
    assert config.cache is not None
    _set_jax("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    _set_jax("jax_persistent_cache_min_compile_time_secs", 0.0)
    _set_jax("jax_persistent_cache_min_entry_size_bytes", -1)
    if not config.getoption("optimize"):
        _set_jax("jax_disable_most_optimizations", True)
        flags = ["--xla_cpu_parallel_codegen_split_count=1"]
        if jax.version.__version_info__ < (0, 11):
            flags.append("--xla_cpu_use_fusion_emitters=false")  # halves compilation; newer XLA has no other
        # Workers inherit them; said twice, they would make other programs of the cache than said once.
        flags += os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(flags))
    gc.set_threshold(200_000, 50, 50)  # tracing makes many small objects; walking them took 7 % of the time


def _set_jax(option: str, value: str | float | bool) -> None:
    """Sets an option of JAX here and in the processes that tests start."""
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--reference live`, tests marked `live` are not run."""
    if ANSWERS.mode != "live":
        live = [item for item in items if item.get_closest_marker("live")]
        items[:] = [item for item in items if item not in set(live)]
        config.hook.pytest_deselected(items=live)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Slow tests ask the reference itself, whatever the mode."""
    ANSWERS.bypass = item.get_closest_marker("slow") is not None


def pytest_sessionfinish() -> None:
    if ANSWERS.mode == "remake":
        ANSWERS.write()


MOST_MEMORY_MAPS = 40_000
"""Compiled programs hold memory maps, and Linux gives a process 65,530."""


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory_maps() -> Iterator[None]:
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
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


@pytest.fixture(scope="module")
def torch_threads() -> Iterator[None]:
    """PyTorch computes on this worker's share of the cores: small models prefer one, real ones need them."""
    import torch

    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(before)
