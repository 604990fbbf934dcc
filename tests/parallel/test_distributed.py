"""Joining a cluster that does not exist, and the helpers in one process; see `processes/` for several."""

import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from phi3_jax.parallel import distributed, processes


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (("one:1234", "two", "0"), "JAX_NUM_PROCESSES='two' is not a number"),
        (("one", "2", "0"), "JAX_COORDINATOR_ADDRESS='one' lacks the port"),
        (("one:1234", "2", "2"), "JAX_PROCESS_ID=2 is not one of JAX_NUM_PROCESSES=2"),
    ],
)
def test_rejects_wrong_variables(
    monkeypatch: pytest.MonkeyPatch, variables: tuple[str, ...], message: str
) -> None:
    for name, value in zip(distributed.VARIABLES, variables, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start()


def test_a_single_process_is_process_0() -> None:
    assert distributed.is_primary()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.from_primary(lambda: 3) == distributed.run_everywhere(lambda: 3) == 3
    with pytest.raises(OSError, match="gone"):
        distributed.from_primary(lambda: open("gone"))  # noqa: SIM115


def test_a_message_waits_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process must not end while one of its devices still connects to another process."""
    finished: list[int] = []

    def slowly(row: np.ndarray, device: np.ndarray) -> np.ndarray:
        time.sleep(0.1 * bool(device))
        finished.append(int(device))
        return np.asarray(row)

    def sum_of_rows(rows: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
        return jax.pure_callback(slowly, shape, rows[0], jax.lax.axis_index("device"))

    mesh = Mesh(np.reshape(jax.devices()[:2], (1, 2)), ("process", "device"))
    monkeypatch.setattr(jax, "devices", lambda: list(mesh.devices.flat))
    each = jax.shard_map(
        sum_of_rows, mesh=mesh, in_specs=PartitionSpec("process"), out_specs=PartitionSpec(), check_vma=False
    )
    monkeypatch.setattr(distributed, "_sum_of_rows", each)
    assert distributed.broadcast("word") == "word"
    assert sorted(finished) == [0, 1]


def test_errors_that_do_not_pickle_are_sent_as_text() -> None:
    class LocalError(Exception):
        pass

    assert repr(distributed.portable(LocalError("lost"))) == "RuntimeError('LocalError: lost')"
    error = FileNotFoundError(2, "No such file", "name")
    assert distributed.portable(error) is error


@pytest.mark.parametrize("mesh", ["fsdp=2,speed=2", "fsdp=two", "fsdp=0"])
def test_rejects_a_wrong_mesh_before_it_waits_for_processes(
    monkeypatch: pytest.MonkeyPatch, mesh: str
) -> None:
    def wait(*_: Any) -> None:
        raise AssertionError("waited")

    monkeypatch.setattr(distributed, "start", wait)
    with pytest.raises(ValueError, match="mesh"):
        processes.prepare(mesh, distributed=True)


@pytest.mark.slow
def test_command_reports_that_there_is_no_cluster() -> None:
    command = [
        sys.executable,
        "-c",
        "from phi3_jax.cli import main; main()",
        "generate",
        "Hi",
        "--distributed",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("phi3-jax: no cluster was found (")
    assert "JAX_NUM_PROCESSES" in done.stderr
    assert done.stderr.count("\n") == 1
