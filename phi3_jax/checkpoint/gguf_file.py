"""GGUF files: a checked header, metadata by key, dequantized tensors.

The `gguf` package is imported when a file is opened, so that nothing else needs it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.checkpoint.source import CheckpointError

ARCHITECTURES = ("llama", "phi3")

_STORED = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class GGUFFile:
    """The metadata and the tensors of one .gguf file, under llama.cpp's names.

    Raises:
        CheckpointError: the file cannot be read, is not a GGUF file, is cut short, is one of several parts of
            a model, or has an architecture or a quantization that is not supported.
    """

    def __init__(self, path: Path):
        from gguf.quants import dequantize

        self.path = path
        self._dequantize: Callable[..., np.ndarray] = dequantize
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = ""
        if (count := self.metadata("split.count", 1)) > 1:
            raise self.error(
                f"this is one of {count} parts of a split file; join them first: llama-gguf-split --merge"
            )
        self.architecture = self.metadata("general.architecture")
        if self.architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise self.error(f"architecture {self.architecture!r} is not supported; supported: {supported}")
        self._check_quantization()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Returns every tensor's name."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the tensor's shape, rows first.

        Raises:
            CheckpointError: the file lacks the tensor.
        """
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of `values`: the stored one, or float32 for a quantized tensor."""
        return _STORED.get(self._tensor(name).tensor_type.name, np.dtype(np.float32))

    def values(self, name: str) -> np.ndarray:
        """Returns the tensor, dequantized; it may be a view of the file."""
        tensor = self._tensor(name)
        if tensor.tensor_type.name == "BF16":
            return tensor.data.view(ml_dtypes.bfloat16)
        if tensor.tensor_type.name in _STORED:
            return tensor.data
        return self._dequantize(tensor.data, tensor.tensor_type)

    def metadata(self, key: str, default: Any = None) -> Any:
        """Returns the value of a metadata key, in which "{arch}." stands for the file's architecture."""
        field = self._reader.get_field(key.replace("{arch}", self.architecture))
        if field is None:
            return default
        value = field.contents()
        return shortest_decimal(value) if [kind.name for kind in field.types] == ["FLOAT32"] else value

    def require(self, key: str) -> Any:
        """Returns the value of a metadata key.

        Raises:
            CheckpointError: the file lacks the key.
        """
        value = self.metadata(key)
        if value is None:
            raise self.error(f"the metadata lacks {key.replace('{arch}', self.architecture)!r}")
        return value

    def error(self, text: str) -> CheckpointError:
        """Returns an error that names the file."""
        return CheckpointError(f"{self.path}: {text}")

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise self.error(f"tensor {name!r} is missing")
        return self._tensors[name]

    def _check_quantization(self) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        for kind, name in {
            tensor.tensor_type: name for name, tensor in reversed(self._tensors.items())
        }.items():
            if kind.name in _STORED:
                continue
            try:
                self._dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise self.error(
                    f"tensor {name!r} is stored as {kind.name}, which the gguf package cannot dequantize; "
                    "convert the file to F16 or Q8_0"
                ) from None


def _open(path: Path) -> Any:
    """Returns the gguf package's reader of a file whose tensors are known to lie within it."""
    from gguf import GGUFReader
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.gguf_reader import ReaderField

    class CheckedReader(GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
            for field in fields:
                name = bytes(field.parts[1]).decode("utf-8", "replace")
                number = int(field.parts[4][0])
                try:
                    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
                except (ValueError, KeyError):
                    raise CheckpointError(
                        f"tensor {name!r} is stored as type {number}, which the gguf package does not know; "
                        "upgrade it (pip install -U gguf) or convert the file to F16 or Q8_0"
                    ) from None
                length = math.prod(int(n) for n in field.parts[3]) // block * size
                end = start_offs + int(field.parts[5][0]) + length
                if end > len(self.data):
                    raise CheckpointError(
                        f"the file is cut short: tensor {name!r} ends at byte {end:,}, "
                        f"the file has {len(self.data):,}; fetch it again"
                    )
            super()._build_tensors(start_offs, fields)

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file (it begins with {magic!r}, not b'GGUF')")
    try:
        reader = CheckedReader(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # The package's reader raises different errors for a damaged header, depending on the damage.
        raise CheckpointError(
            f"{path}: the GGUF header is damaged or cut short ({error}); fetch it again"
        ) from error
    if reader.byte_order == "S":
        raise CheckpointError(
            f"{path}: written for the other byte order; turn it round with gguf-convert-endian"
        )
    return reader


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal that float32 rounds to `value`: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
