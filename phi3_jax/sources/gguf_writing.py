"""Writes GGUF files: small ones, and copies of others with some metadata and tensors replaced."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from phi3_jax.sources.gguf_file import GGUFFile

Value = str | int | float
"""A value of the metadata: a text, a number from 0 to 2**32 - 1, or a number of float32."""


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Float[np.ndarray, "..."]],
    *,
    source: GGUFFile | None = None,
    is_replaced: Callable[[str], bool] = lambda name: False,
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a GGUF file, tensor by tensor.

    Args:
        path: the file; an existing one is replaced.
        architecture: the file's `general.architecture`.
        metadata: values by their full keys.
        tensors: float32 arrays by name.
        source: a file whose other metadata and tensors are copied first, as they are stored.
        is_replaced: whether a key or a tensor of the source is left out; those that are written anew always
            are.
        on_written: gets the bytes of tensors that are written and that will be, after each tensor.
    """
    from gguf import GGUFWriter

    copied = [] if source is None else source.stored_tensors()
    copied = [each for each in copied if each.name not in tensors and not is_replaced(each.name)]
    writer = GGUFWriter(path, architecture)
    try:
        if source is not None:
            for key, value, kind, of in source.stored_metadata():
                if key not in metadata and not is_replaced(key):
                    writer.add_key_value(key, value, kind, sub_type=of)
            writer.data_alignment = source.metadata("general.alignment", writer.data_alignment)
        for key, value in metadata.items():
            _add(writer, key, value)
        for each in copied:
            numbers = each.data
            writer.add_tensor_info(
                each.name, numbers.shape, numbers.dtype, numbers.nbytes, raw_dtype=each.tensor_type
            )
        for name, numbers in tensors.items():
            writer.add_tensor_info(name, numbers.shape, numbers.dtype, numbers.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        arrays = [*(each.data for each in copied), *tensors.values()]
        done, total = 0, sum(each.nbytes for each in arrays)
        for numbers in arrays:
            writer.write_tensor_data(numbers)
            done += numbers.nbytes
            on_written(done, total)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)
