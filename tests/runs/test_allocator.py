"""Memory that the process keeps: the tests count pages that the kernel maps again, not time."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from phi3_jax.runs import allocator

PROGRAM = """
import resource, sys
if sys.argv[1] == "keep":
    from phi3_jax.runs.allocator import keep_freed_memory
    keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def work(x):
    y = jax.lax.sort(jnp.broadcast_to(x, (3, x.size)) * 2.0, dimension=1)  # 24 MB that are freed afterwards
    return y[:, ::4096].sum()

x = jnp.arange(2.0 ** 21)
for turn in range(16):
    work(x).block_until_ready()
    if turn == 7:  # memory is allocated by then
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(*, keep: bool) -> int:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, "keep" if keep else "free"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only for glibc")
def test_a_program_that_runs_again_reuses_its_memory() -> None:
    freed = pages(keep=False)
    if freed < 4000:
        pytest.skip(f"this C library keeps memory by itself: {freed} pages in eight runs")
    # Now and then more threads than before need memory at the same moment, and the process takes more once.
    assert any(pages(keep=True) < freed / 10 for _ in range(3))


@pytest.mark.parametrize(
    ("platforms", "libtpu", "kept"),
    [("cpu", True, True), ("tpu,cpu", False, False), (None, True, False), (None, False, True)],
)
def test_does_nothing_if_there_may_be_an_accelerator(
    platforms: str | None, libtpu: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    called: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *arguments: called.append(arguments))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(
        allocator.importlib.util, "find_spec", lambda name: object() if libtpu and name == "libtpu" else None
    )
    monkeypatch.setattr(sys, "platform", "linux")
    allocator.keep_freed_memory()
    assert bool(called) == kept
