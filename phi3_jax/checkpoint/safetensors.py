"""Reads and writes safetensors: single files, and shards with an index."""

import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from phi3_jax.checkpoint.companions import DirectoryFiles
from phi3_jax.checkpoint.source import CheckpointError, FloatSource, TensorSource
from phi3_jax.errors import UserError
from phi3_jax.runs.text import read_json
from phi3_jax.sizes import round_up
from phi3_jax.storage.fetch import remote_files
from phi3_jax.storage.objects import LocalFile, RangedFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AUTO_GPTQ = "gptq_model-*.safetensors"
"""The name that AutoGPTQ gives its only file."""
BLOCK = 1 << 23
"""Bytes to read at once where only some columns of the rows are kept, or single rows."""

HEADER_BLOCK = 1 << 16
"""Bytes of a remote file to read first; most headers are shorter."""
MOST_HEADER = 100_000_000
"""The longest header that the format allows."""

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED_DTYPES = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_DTYPE_NAMES = {dtype: name for name, dtype in (_DTYPES | _QUANTIZED_DTYPES).items()}
_PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Stored(NamedTuple):
    """The position of a tensor's bytes in a file, and their meaning."""

    file: RangedFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.shape[:1]), math.prod(self.shape[1:])


class SafetensorsSource(DirectoryFiles, FloatSource):
    """The safetensors of a directory in Hugging Face's layout; each file's header is read once, at the start.

    Args:
        quantized: whether there may be integers and 8-bit floats, of which quantized weights consist.

    Raises:
        CheckpointError: there are no safetensors, a shard that the index names is missing, a file is
            truncated or foreign, the index disagrees with its shards, tensors are not floating point.
    """

    def __init__(self, directory: str | os.PathLike[str], *, quantized: bool = False):
        self.path = Path(directory)
        self._stored: dict[str, _Stored] = {}
        dtypes = _DTYPES | _QUANTIZED_DTYPES if quantized else _DTYPES
        self._ranged_files = self._files()
        for file, expected in self._ranged_files:
            header = _read_header(file)
            if expected is not None and (absent := sorted(expected.difference(header))):
                raise CheckpointError(f"{file} lacks {some(absent)}, which {INDEX} places there")
            for name, (offset, dtype, shape) in header.items():
                if expected is not None and name not in expected:
                    continue
                if dtype not in dtypes:
                    advice = ""
                    if dtype in _QUANTIZED_DTYPES:
                        advice = (
                            "; it seems to be of a quantized weight, but config.json has no "
                            "quantization_config that says how: copy the config.json of the same checkpoint"
                        )
                    raise CheckpointError(
                        f"{file}: {name} has dtype {dtype}; expected one of {', '.join(dtypes)}{advice}"
                    )
                self._stored[name] = _Stored(file, offset, shape, dtypes[dtype])

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def file(self, name: str) -> str:
        """Returns the path or URL of the file that has this tensor, or would have it if it were there."""
        stored = self._stored.get(name)
        return str(self.path if stored is None else stored.file)

    def check_unchanged(self) -> None:
        for file, _ in self._ranged_files:
            file.check()

    def names(self) -> Sequence[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._stored[name].dtype

    def read(self, name: str) -> np.ndarray:
        height, width = self._stored[name].matrix
        return self.read_part(name, [slice(0, height)], slice(0, width)).reshape(self.shape(name))

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        stored = self._stored[name]
        _, width = stored.matrix
        size = width * stored.dtype.itemsize
        count = sum(run.stop - run.start for run in rows)
        kept = np.empty((count, columns.stop - columns.start), stored.dtype)
        try:
            if columns != slice(0, width) or 1 < count < 2 * len(rows):  # some columns, or single rows
                self._read_blocks(stored, rows, columns, kept)
            else:
                starts = np.cumsum([0, *(run.stop - run.start for run in rows)])
                parts = (kept[start:stop] for start, stop in pairwise(starts))
                stored.file.read(
                    [
                        (stored.offset + run.start * size, _bytes(part))
                        for run, part in zip(rows, parts, strict=True)
                    ]
                )
        except EOFError:
            raise CheckpointError(f"{stored.file} ends within {name}; fetch it again") from None
        return kept

    def _read_blocks(self, stored: _Stored, rows: Sequence[slice], columns: slice, kept: np.ndarray) -> None:
        """Reads rows in blocks of which only some columns are kept, in the order of the file.

        One row between others is read with them: of rows that take turns, a store would have to be asked for
        each one.
        """
        _, width = stored.matrix
        size = width * stored.dtype.itemsize
        step = max(1, BLOCK // size)
        numbers = np.concatenate([np.arange(run.start, run.stop) for run in rows])
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        ends = np.flatnonzero(np.diff(ordered) > 2) + 1
        for first, last in pairwise([0, *ends.tolist(), len(order)]):
            for start in range(ordered[first], ordered[last - 1] + 1, step):
                stop = min(start + step, ordered[last - 1] + 1)
                block = np.empty((stop - start, width), stored.dtype)
                stored.file.read([(stored.offset + start * size, _bytes(block))])
                own = slice(*np.searchsorted(ordered, (start, stop)))
                kept[order[own]] = block[ordered[own] - start, columns]

    def _files(self) -> list[tuple[RangedFile, set[str] | None]]:
        """Returns the files to read, each with the tensors that an index expects in it."""
        files = weight_files(self.path)
        index = self.path / INDEX
        if SINGLE in files:
            return [(files[SINGLE], None)]
        if not index.is_file() and len(found := fnmatch.filter(files, AUTO_GPTQ)) == 1:
            return [(files[found[0]], None)]
        if not index.is_file():
            names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            raise CheckpointError(
                f"{self.path} is not a checkpoint: it has neither {SINGLE} nor {INDEX}, "
                f"only {some(names) if names else 'nothing'}. Pickled weights (.bin, .pth) are not read; "
                "save them as safetensors with transformers first"
            )
        shards: dict[str, set[str]] = {}
        for tensor, shard in _weight_map(index).items():
            shards.setdefault(shard, set()).add(tensor)
        if absent := [name for name in sorted(shards) if name not in files]:
            raise CheckpointError(f"{self.path} lacks {some(absent)}, which {INDEX} names; copy it again")
        return [(files[name], shards[name]) for name in sorted(shards)]


def weight_files(directory: Path) -> dict[str, RangedFile]:
    """Returns a directory's safetensors by name; of one that was fetched those that stayed in its store."""
    found: dict[str, RangedFile] = {
        path.name: LocalFile(path) for path in directory.glob("*.safetensors") if path.is_file()
    }
    return found | remote_files(directory)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_header(file: RangedFile) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Returns the offset, the dtype's name and the shape of each tensor in a file."""
    try:
        # The library checks the header, and the file's size against it.
        with _with_header(file) as path, safe_open(path, framework="np") as opened:
            names = opened.offset_keys()
            tensors = [opened.get_slice(name) for name in names]
            headers = [(tensor.get_dtype(), tuple(tensor.get_shape())) for tensor in tensors]
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.size} bytes) is truncated or not a safetensors file: {error}; fetch it again"
        ) from error
    # The library does not tell the offsets. The tensors have no gaps between them and end with the file.
    sizes = [math.prod(shape) * _bits(dtype) // 8 for dtype, shape in headers]
    offsets = accumulate(sizes, initial=file.size - sum(sizes))
    return {name: (start, *header) for name, start, header in zip(names, offsets, headers, strict=False)}


@contextmanager
def _with_header(file: RangedFile) -> Iterator[Path]:
    """Yields a local file with the header and the size of `file`, and a hole in place of remote tensors."""
    if isinstance(file, LocalFile):
        yield file.path
        return
    start = bytearray(min(file.size, HEADER_BLOCK))
    file.read([(0, memoryview(start))])
    rest = min(file.size, 8 + min(MOST_HEADER, int.from_bytes(start[:8], "little"))) - len(start)
    if rest > 0:
        more = bytearray(rest)
        file.read([(len(start), memoryview(more))])
        start += more
    with TemporaryDirectory(prefix="phi3-jax-") as folder:
        path = Path(folder, file.name)
        with path.open("wb") as stub:
            stub.write(start)
            stub.truncate(file.size)
        yield path


def _bits(dtype: str) -> int:
    """Returns the size that a dtype's name contains: 16 of BF16, 8 of F8_E4M3."""
    return 8 if dtype == "BOOL" else int(re.findall(r"\d+", dtype)[0])


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the file of each tensor as the index gives it."""
    try:
        content = read_json(index)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index} has no weight_map that gives each tensor its file")
    for tensor, file in mapping.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise CheckpointError(f"{index} places {tensor} in {file!r}; expected a file beside the index")
    return mapping


def parse_size(size: int | str) -> int:
    """Returns the bytes of "5GB", "500MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or (number := int(float(match[1]) * unit)) < 1:
        raise UserError(f"max_shard_size={size!r} is not a size; write a number of bytes, 500MB or 5GB")
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
    """Returns `source` with every tensor in `dtype`; None leaves them as they are."""
    return source if dtype is None else _Cast(source, dtype)


def write_tensors(source: TensorSource, directory: Path, max_shard_size: int | str) -> None:
    """Writes all tensors of `source`: one file if they fit in `max_shard_size`, else shards with an index.

    One tensor at a time is held in memory.
    """
    shards = list(_shards(source, parse_size(max_shard_size)))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(source, names, directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_size(source, name) for name in source.names())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(source: TensorSource, names: Iterable[str], path: Path) -> None:
    """Writes one safetensors file, tensor by tensor; the library's own writer wants all of them in memory.

    The format is the header's length in 8 bytes, the header in JSON, padded to 8 bytes, then the data. The
    widest dtypes come first, so that every tensor is aligned. Tensors are read in the order of `names`.
    """
    names = list(names)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: -source.dtype(name).itemsize):
        starts[name], end = end, end + _size(source, name)
        header[name] = {
            "dtype": _DTYPE_NAMES[source.dtype(name)],
            "shape": list(source.shape(name)),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text = text.ljust(round_up(len(text), 8))
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name in names:
            file.seek(first + starts[name])
            # Not held in a variable, which would keep it in memory while the next one is read.
            file.write(
                np.ascontiguousarray(source.read(name), dtype=source.dtype(name))
                .reshape(-1)
                .view(np.uint8)
                .data
            )


def _size(source: TensorSource, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


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


def parameter_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype that the user names.

    Raises:
        UserError: parameters cannot have it.
    """
    try:
        kind = np.dtype(jnp.dtype(dtype))
    except (TypeError, ValueError):
        kind = None
    if kind is None or kind.name not in _PARAMETER_DTYPES:
        name = dtype if isinstance(dtype, str) or kind is None else kind
        raise UserError(f"dtype={name} cannot be that of parameters; use {', '.join(_PARAMETER_DTYPES)}")
    return kind


def some(names: Iterable[str], limit: int = 5) -> str:
    """Returns a text with the first few of many names."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
