"""Safetensors in and out: single files and shards with an index."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from phi3_jax.checkpoint.source import CheckpointError, TensorSource

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class SafetensorsSource:
    """The safetensors of a directory in Hugging Face's layout. Headers are read and checked at once.

    Raises:
        CheckpointError: no safetensors, a shard that the index names but that is missing, a truncated or
            foreign file, an index that disagrees with its shards, tensors that are not floating point.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self._headers: dict[str, tuple[Path, tuple[int, ...], np.dtype]] = {}
        for path, expected in self._files():
            found = self._read_header(path)
            if expected is not None and (absent := sorted(expected - found)):
                raise CheckpointError(f"{path} lacks {_some(absent)}, which {INDEX} places there")

    def names(self) -> Sequence[str]:
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self._headers[name][2]

    def read(self, name: str) -> np.ndarray:
        # Opened anew for each tensor: an open file keeps every page that was read in the process's memory.
        with safe_open(self._headers[name][0], framework="np") as file:
            return file.get_tensor(name)

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        """The files to read and, where an index says so, the tensors expected in each."""
        index = self.directory / INDEX
        if (self.directory / SINGLE).is_file():
            return [(self.directory / SINGLE, None)]
        if not index.is_file():
            found = sorted(p.name for p in self.directory.iterdir()) if self.directory.is_dir() else []
            raise CheckpointError(
                f"{self.directory} is not a checkpoint: it has neither {SINGLE} nor {INDEX}, "
                f"only {_some(found) if found else 'nothing'}. Pickled weights (.bin, .pth) are not read; "
                "save them as safetensors with transformers first"
            )
        shards: dict[str, set[str]] = {}
        for tensor, shard in _weight_map(index).items():
            shards.setdefault(shard, set()).add(tensor)
        if absent := [name for name in sorted(shards) if not (self.directory / name).is_file()]:
            raise CheckpointError(
                f"{self.directory} lacks {_some(absent)}, which {INDEX} names; copy it again"
            )
        return [(self.directory / name, shards[name]) for name in sorted(shards)]

    def _read_header(self, path: Path) -> set[str]:
        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                for name in names:
                    view = file.get_slice(name)
                    kind = view.get_dtype()
                    if kind not in _DTYPES:
                        raise CheckpointError(
                            f"{path}: {name} has dtype {kind}; expected one of {', '.join(_DTYPES)}"
                        )
                    self._headers[name] = (path, tuple(view.get_shape()), _DTYPES[kind])
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {error}; "
                "fetch it again"
            ) from error
        return set(names)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{index} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{index} has no weight_map") from error
    if not isinstance(mapping, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in mapping.values()
    ):
        raise CheckpointError(f"{index}: weight_map must give each tensor a file beside the index")
    return mapping


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or (number := int(float(match[1]) * unit)) < 1:
        raise ValueError(f"max_shard_size={size!r} is not a size; write a number of bytes, 500MB or 5GB")
    return number


class _Cast:
    """A source whose tensors are cast as they are read."""

    def __init__(self, source: TensorSource, dtype: np.dtype):
        self.source = source
        self._dtype = dtype

    def names(self) -> Sequence[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._dtype

    def read(self, name: str) -> np.ndarray:
        return self.source.read(name).astype(self._dtype)


def cast(source: TensorSource, dtype: np.dtype | None) -> TensorSource:
    """`source` with every tensor in `dtype`; None leaves them."""
    return source if dtype is None else _Cast(source, dtype)


def write_tensors(source: TensorSource, directory: Path, max_shard_size: int | str) -> None:
    """Writes all tensors of `source`: one file if they fit in `max_shard_size`, else shards with an index.

    One shard at a time is held in memory.
    """
    shards = list(_shards(source, parse_size(max_shard_size)))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: np.ascontiguousarray(source.read(name)) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_size(source, name) for name in source.names())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _size(source: TensorSource, name: str) -> int:
    return int(np.prod(source.shape(name), dtype=np.int64)) * source.dtype(name).itemsize


def _shards(source: TensorSource, limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    used = 0
    for name in source.names():
        size = _size(source, name)
        if shard and used + size > limit:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    if shard:
        yield shard


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` whose files take their place there when the block ends well.

    Weights that `target` held before are removed, so that old shards cannot mix with new ones; other files stay.
    After an error nothing is left behind and `target` is as it was.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        if not target.exists():
            work.rename(target)
            return
        old = {path.name for path in target.glob("model*.safetensors")} | {INDEX}
        new = sorted(work.iterdir(), key=lambda path: path.name == "config.json")
        for path in new:
            os.replace(path, target / path.name)
        for name in old - {path.name for path in new}:
            (target / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(target: Path, error: Exception) -> CheckpointError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    reason = "there is no space left on the disk" if full else str(error)
    return CheckpointError(f"{target} cannot be written: {reason}; nothing was changed")


def _some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of many names."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
