"""Builds the C++ library once, keeps it in a folder, and loads it."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib
from filelock import FileLock

from phi3_jax.runs.cache_folder import cache_folder
from phi3_jax.runs.files import remove_leftovers, replacing

VARIABLE = "PHI3_JAX_NATIVE"
"""The environment variable: 0 turns the library off, a path names another folder for it."""

HEADERS = (
    *("product.h", "kernels.h", "vectors.h", "arm.h"),
    *("attention.h", "attention_blocks.h", "attention_kernels.h", "threads.h", "frame.h"),
)
SOURCES = ("variants.cc", "product_handler.cc", "attention_handler.cc", "write_handler.cc")
COMPILERS = ("c++", "g++", "clang++")
"""The compilers that are tried; the variable CXX names another one."""

FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=fast", "-fno-schedule-insns", "-w"),
)
"""The compiler's options. They name no instructions: the library chooses its variant when it runs.

For Arm, GCC would reorder instructions before it assigns registers, and then lack registers for sums.
"""

_LONGEST_BUILD = 300
"""In seconds."""


class UnavailableError(Exception):
    """The library cannot be built or loaded; the message says why."""


def is_wanted() -> bool:
    """Whether the user has left the library on."""
    return os.environ.get(VARIABLE) != "0"


def library_folder() -> Path:
    """Returns the folder of the library."""
    named = os.environ.get(VARIABLE, "")
    return cache_folder() / "native" if named in ("", "0", "1") else Path(named).expanduser().absolute()


def load_library() -> ctypes.CDLL:
    """Loads the library, after building it if its folder does not have it.

    Raises:
        UnavailableError: there is no compiler, it fails, or the folder cannot be used.
    """
    folder = library_folder()
    try:
        compiler = _find_compiler()
        name = f"product-{_key(compiler)}"
        library = _open_library(folder, name)
        if library is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                # Another process may have built it meanwhile.
                library = _open_library(folder, name) or ctypes.CDLL(str(_build(compiler, folder, name)))
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{folder}: {error}") from error
    return library


def _find_compiler() -> tuple[str, ...]:
    """Returns the compiler's path and the options that CXX gives it."""
    named = shlex.split(os.environ.get("CXX", ""))
    for name in named[:1] or COMPILERS:
        if path := shutil.which(name):
            return (path, *named[1:])
    if named:
        raise UnavailableError(f"CXX={os.environ['CXX']!r} names no program")
    raise UnavailableError(f"there is no C++ compiler on PATH ({', '.join(COMPILERS)}), and CXX names none")


def _key(compiler: tuple[str, ...]) -> str:
    """Returns a digest of everything that the library depends on."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=_LONGEST_BUILD, check=True
    )
    here = (sys.platform, platform.machine(), jaxlib.__version__, *compiler[1:], *FLAGS)
    parts = [repr(here).encode(), version.stdout]
    parts += [Path(__file__).with_name(name).read_bytes() for name in (*HEADERS, *SOURCES)]
    return _digest(b"".join(hashlib.sha256(part).digest() for part in parts))


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:16]


def _open_library(folder: Path, name: str) -> ctypes.CDLL | None:
    """Loads the library if it is there. A file that is not whole, or not for this machine, counts as absent.

    A truncated library could end the process, so that the digest in the file's name is compared first.
    """
    for path in folder.glob(f"{name}-*.so"):
        try:
            if path.stem == f"{name}-{_digest(path.read_bytes())}":
                return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


def _build(compiler: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compiles the library into `folder`, in place of one that cannot be loaded, and returns its path."""
    for path in folder.glob(f"{name}-*.so"):
        path.unlink()
    remove_leftovers(folder, "product-")
    with tempfile.TemporaryDirectory(prefix="phi3-jax-build-") as scratch:
        made = Path(scratch) / "product.so"
        sources = [str(Path(__file__).with_name(source)) for source in SOURCES]
        command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(made)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LONGEST_BUILD
        )
        if done.returncode != 0 or not made.is_file():
            lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise UnavailableError(f"{compiler[0]} failed: {first.strip()}")
        contents = made.read_bytes()
    path = folder / f"{name}-{_digest(contents)}.so"
    with replacing(path) as work:
        work.write_bytes(contents)
    return path
