"""GGUF files: a checked header, metadata by key, dequantized tensors.

The `gguf` package is imported when a file is opened, so that nothing else needs it.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.errors import CheckpointError

ARCHITECTURES = ("llama", "phi3")

_STORED = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


MOST_KEYS = 1 << 16
"""Metadata keys or tensors; the largest models have about two thousand."""

MOST_ELEMENTS = 1 << 22
"""Elements of all arrays together; the largest vocabularies, with merges and scores, have 1.3 million."""

_Rule = tuple[str, Callable[[Any], bool]]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_list(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_kind(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


_size: _Rule = ("a positive integer below 2**31", _is_size)
_sizes: _Rule = ("a positive integer, or one for each layer", lambda v: _is_size(v) or _is_list(_is_size)(v))
_number: _Rule = ("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v))
_text: _Rule = ("a text", _is_kind(str))
_flag: _Rule = ("true or false", _is_kind(bool))
_texts: _Rule = ("a list of texts", _is_list(_is_kind(str)))
_integers: _Rule = ("a list of integers", _is_list(_is_kind(int)))
_numbers: _Rule = ("a list of numbers", _is_list(_is_kind(int, float)))
_token: _Rule = ("a token id, 0 or more", lambda v: type(v) is int and 0 <= v < 2**31)

# What the values of the keys that are read must be, in words and as a test.
_RULES: dict[str, _Rule] = {
    "split.count": ("an integer", _is_kind(int)),
    "{arch}.embedding_length": _size,
    "{arch}.context_length": _size,
    "{arch}.block_count": _size,
    "{arch}.feed_forward_length": _sizes,
    "{arch}.attention.head_count": _sizes,
    "{arch}.attention.head_count_kv": _sizes,
    "{arch}.attention.key_length": _size,
    "{arch}.attention.value_length": _size,
    "{arch}.attention.layer_norm_rms_epsilon": _number,
    "{arch}.attention.sliding_window": ("an integer, 0 or more", _token[1]),
    "{arch}.rope.dimension_count": _size,
    "{arch}.rope.freq_base": _number,
    "{arch}.rope.scale_linear": _number,
    "{arch}.rope.scaling.type": _text,
    "{arch}.rope.scaling.factor": _number,
    "{arch}.rope.scaling.attn_factor": _number,
    "{arch}.rope.scaling.original_context_length": _size,
    "{arch}.rope.scaling.yarn_beta_fast": _number,
    "{arch}.rope.scaling.yarn_beta_slow": _number,
    **{f"tokenizer.ggml.{name}": _text for name in ("model", "pre")},
    "tokenizer.chat_template": _text,
    "tokenizer.ggml.tokens": _texts,
    "tokenizer.ggml.merges": _texts,
    "tokenizer.ggml.token_type": _integers,
    "tokenizer.ggml.scores": _numbers,
    **{f"tokenizer.ggml.add_{name}": _flag for name in ("bos_token", "eos_token", "space_prefix")},
    **{
        f"tokenizer.ggml.{name}_token_id": _token
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    },
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

    def kind(self, name: str) -> str:
        """Returns the kind of a tensor's numbers under llama.cpp's name, such as "F16" or "Q8_0"."""
        return self._tensor(name).tensor_type.name

    def is_quantized(self, name: str) -> bool:
        return self.kind(name) not in _STORED

    def blocks(self, name: str) -> np.ndarray:
        """Returns the rows of a quantized tensor, as bytes; a view of the file."""
        return self._tensor(name).data

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
        """Returns the value of a metadata key, in which "{arch}." stands for the file's architecture.

        Raises:
            CheckpointError: the value is not of the kind that the key has.
        """
        name = key.replace("{arch}", self.architecture)
        field = self._reader.get_field(name)
        if field is None:
            return default
        try:
            value = field.contents()
        except (UnicodeDecodeError, IndexError) as error:  # an array without elements has no kind
            if not isinstance(error, IndexError):
                raise self.error(f"{name} is not valid UTF-8") from error
            value = []
        if [kind.name for kind in field.types] == ["FLOAT32"]:
            value = shortest_decimal(value)
        expected, holds = _RULES.get(key, ("", lambda _: True))
        if not holds(value):
            raise self.error(f"{name} = {value!r:.80} must be {expected}")
        return value

    def stored_metadata(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """Yields each key with its value, the value's type, and the type of an array's elements.

        Types are the gguf package's. The architecture and arrays without elements, which have no type, are
        left out.

        Raises:
            CheckpointError: a text is not valid UTF-8.
        """
        for field in self._reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            try:
                value = field.contents()
            except UnicodeDecodeError as error:
                raise self.error(f"{field.name} is not valid UTF-8") from error
            except IndexError:
                continue
            yield field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None

    def stored_tensors(self) -> list[Any]:
        """Returns the gguf package's descriptions of the tensors; their data are views of the file."""
        return list(self._reader.tensors)

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
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
    from gguf.gguf_reader import ReaderField

    class CheckedReader(GGUFReader):
        elements = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            # The package's own slices are shorter than asked beyond the end, and a wrong count is read on.
            # They are also slow, as each is a memory map of its own.
            order = override_order or self.byte_order
            kind = np.dtype(dtype) if order == "I" else np.dtype(dtype).newbyteorder(order)
            end = int(offset) + kind.itemsize * int(count)
            if end > len(self.data):
                raise IndexError(f"it asks for byte {end:,} of {len(self.data):,}")
            return np.ndarray((int(count),), kind, self.data, int(offset))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                if self._get(orig_offs, np.uint32)[0] == GGUFValueType.ARRAY:
                    raise ValueError("it has arrays of arrays")
                self.elements += int(self._get(orig_offs + 4, np.uint64)[0])
                _check_count("elements of arrays", self.elements, MOST_ELEMENTS)
                return self._get_array(orig_offs)
            return super()._get_field_parts(orig_offs, raw_type)

        def _get_array(self, start: int) -> Any:
            # The package's own loop takes a second for the vocabulary of a small model.
            number, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
            parts, indices, at = [number, count], [], start + 12
            kind = GGUFValueType(int(number[0]))
            types = [GGUFValueType.ARRAY, kind] if count[0] else [GGUFValueType.ARRAY]
            if kind == GGUFValueType.STRING:
                for index in range(int(count[0])):
                    length, text = self._get_str(at)
                    parts += length, text
                    indices.append(2 * index + 3)
                    at += 8 + len(text)
            else:
                numbers = self._get(at, self.gguf_scalar_to_np[kind], int(count[0]))
                parts.extend(numbers.reshape(-1, 1))
                indices += range(2, 2 + len(numbers))
                at += numbers.nbytes
            return at - start, parts, indices, types

        def _build_fields(self, offs: int, count: int) -> int:
            _check_count("metadata keys", count, MOST_KEYS)
            return super()._build_fields(offs, count)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            _check_count("tensors", count, MOST_KEYS)
            return super()._build_tensor_info(offs, count)

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


def _check_count(what: str, count: int, most: int) -> None:
    if int(count) > most:
        raise ValueError(f"it counts {int(count):,} {what}; at most {most:,} are read")


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal that float32 rounds to `value`: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
