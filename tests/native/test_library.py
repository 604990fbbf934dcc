"""Tests how the C++ library is built, kept, loaded and left out."""

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model.layers import matmul
from phi3_jax.native import library as module
from phi3_jax.native import targets
from phi3_jax.native.library import UnavailableError, library_folder, load_library

LOAD = "from phi3_jax.native.library import load_library; load_library()"

COMPILER = """\
#!/bin/sh
if [ "$1" = --version ]; then cat "{folder}/version"; exit; fi
sleep {seconds}
echo built >> "{folder}/builds"
for output; do :; done
cp "{library}" "$output"
"""
"""Takes a built library for the result of a build, and counts builds."""


class Builds:
    """A folder for the library, and a compiler that takes no time."""

    def __init__(self, folder: Path, library: Path, seconds: float = 0):
        self.folder = folder / "libraries"
        self._log, self._version = folder / "builds", folder / "version"
        self.set_version("1")
        self.compiler = folder / "compiler"
        self.compiler.write_text(COMPILER.format(folder=folder, library=library, seconds=seconds))
        self.compiler.chmod(0o755)
        self.environment = {"CXX": str(self.compiler), "PHI3_JAX_NATIVE": str(self.folder)}

    @property
    def count(self) -> int:
        return self._log.read_text().count("built") if self._log.exists() else 0

    @property
    def libraries(self) -> list[Path]:
        return list(self.folder.glob("*.so"))

    def set_version(self, version: str) -> None:
        self._version.write_text(version)


@pytest.fixture
def builds(tmp_path: Path, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """Lets `load_library` use a compiler that takes no time."""
    result = Builds(tmp_path, Path(library._name))
    for name, value in result.environment.items():
        monkeypatch.setenv(name, value)
    return result


@pytest.fixture
def new_process() -> Iterator[None]:
    """Lets this process look for the library again, and forget the result after the test."""
    targets._library.cache_clear()
    yield
    targets._library.cache_clear()


def test_builds_once_for_a_compiler(builds: Builds) -> None:
    for _ in range(2):
        assert load_library().phi3_jax_variant
    assert builds.count == 1
    builds.set_version("2")
    load_library()
    assert builds.count == 2
    assert [path.name for path in builds.folder.iterdir() if path.name.startswith(".")] in ([], [".lock"])


def test_processes_build_once_together(tmp_path: Path, library: ctypes.CDLL) -> None:
    builds = Builds(tmp_path, Path(library._name), seconds=0.5)
    command = [sys.executable, "-c", LOAD]
    processes = [subprocess.Popen(command, env=os.environ | builds.environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert builds.count == 1


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_truncated_library_is_built_again(builds: Builds, size: int) -> None:
    load_library()
    (path,) = builds.libraries
    contents = path.read_bytes()[:size]
    path.unlink()  # this process has loaded the whole file, and would end by SIGBUS if it became shorter
    path.write_bytes(contents)
    load_library()
    assert builds.count == 2
    assert builds.libraries == [path]


def test_a_library_of_another_machine_is_built_again(builds: Builds) -> None:
    load_library()
    (path,) = builds.libraries
    contents = b"\x7fELF of another machine"
    name = path.stem.rpartition("-")[0]
    path.unlink()
    (builds.folder / f"{name}-{module._digest(contents)}.so").write_bytes(contents)
    load_library()
    assert builds.count == 2
    assert builds.libraries == [path]


def test_one_warning_and_xla_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"PATH": str(tmp_path), "CXX": "", "PHI3_JAX_NATIVE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    x, weight = jnp.ones((1, 8), jnp.bfloat16), jnp.full((3, 8), 0.5, jnp.bfloat16)
    with caplog.at_level(logging.WARNING, "phi3_jax"):
        for _ in range(2):
            np.testing.assert_array_equal(matmul(x, weight), [[4, 4, 4]])
    (record,) = caplog.records
    assert "no C++ compiler on PATH" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert targets.variant() is None


def test_is_left_out_by_the_variable(
    monkeypatch: pytest.MonkeyPatch, builds: Builds, new_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PHI3_JAX_NATIVE", "0")
    assert not targets.available()
    assert builds.count == 0
    assert not caplog.records


def test_is_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHI3_JAX_CACHE", str(tmp_path))
    for value in ("", "1"):
        monkeypatch.setenv("PHI3_JAX_NATIVE", value)
        assert library_folder() == tmp_path / "native"


def test_names_a_compiler_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(UnavailableError, match="CXX='no-such-compiler -m64' names no program"):
        load_library()


def test_shows_the_first_error_of_the_compiler(builds: Builds) -> None:
    builds.compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho "a.cc:1: error: odd" >&2\nexit 1\n'
    )
    with pytest.raises(UnavailableError, match=r"compiler failed: a\.cc:1: error: odd$"):
        load_library()


def test_names_a_folder_that_cannot_be_used(builds: Builds) -> None:
    builds.folder.write_text("a file")
    with pytest.raises(UnavailableError, match=r"libraries: .*(exists|directory)"):
        load_library()
    assert builds.count == 0
