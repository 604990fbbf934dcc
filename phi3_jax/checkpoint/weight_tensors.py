"""The stored tensors of one quantized weight: checks their headers against each other, and reads them."""

from collections.abc import Sequence
from typing import Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32

from phi3_jax.checkpoint.packing import input_order
from phi3_jax.checkpoint.quantization_config import WeightScheme
from phi3_jax.checkpoint.safetensors import SafetensorsSource
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.quantization import StoredWeight, WeightForm

INT32 = np.dtype(np.int32)
INT64 = np.dtype(np.int64)
INT8 = np.dtype(np.int8)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


class QuantizedTensor(Protocol):
    """A quantized weight in the files, whose headers are checked."""

    kinds: tuple[str, ...]
    """The last parts of the names of its tensors; the first has the integers."""
    by_rows: bool
    """Whether `read` reads only the rows that it returns."""
    shape: tuple[int, int]
    scale_dtype: np.dtype

    @property
    def form(self) -> WeightForm:
        """The form of the weight, from headers and from the order of its inputs."""
        ...

    def read(self, rows: Sequence[slice]) -> StoredWeight:
        """Returns these rows, or all of them if it cannot read by rows.

        Raises:
            CheckpointError: there are scales that are zero or not finite, biases, or inputs of no group.
        """
        ...


class WeightTensors:
    """The tensors `MODULE.qweight`, `MODULE.scales` and so on, which are called here by the last part.

    Errors name the file, the tensor, what it has, and what is expected.

    Args:
        source: the files.
        module: the name of the module.
        main: the last part of the name of the tensor that has the integers.
        has_bias: whether the module has a bias.
    """

    def __init__(self, source: SafetensorsSource, module: str, main: str, has_bias: bool):
        self._source = source
        self._module = module
        self._main = main
        self._has_bias = has_bias

    def __contains__(self, kind: str) -> bool:
        return self._name(kind) in self._source

    def shape(self, kind: str) -> tuple[int, ...]:
        return self._source.shape(self._name(kind))

    def dtype(self, kind: str) -> np.dtype:
        return self._source.dtype(self._name(kind))

    def read(self, kind: str, rows: Sequence[slice] | None = None) -> np.ndarray:
        """Reads a tensor, or these rows of it."""
        name = self._name(kind)
        if rows is None:
            return self._source.read(name)
        width = self.shape(kind)[1] if len(self.shape(kind)) == 2 else 1
        return self._source.read_part(name, rows, slice(0, width))

    def error(self, kind: str, problem: str) -> CheckpointError:
        name = self._name(kind)
        return CheckpointError(f"{self._source.file(name)}: {name} {problem}")

    def check(self, kind: str, dtypes: Sequence[np.dtype], *shapes: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the tensor is there, with one of these dtypes and of these shapes."""
        if kind not in self:
            raise self.error(self._main, f"needs {self._name(kind)}, which is missing")
        if self.dtype(kind) not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise self.error(kind, f"has dtype {self.dtype(kind)}, expected {expected}")
        if self.shape(kind) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.error(kind, f"has shape {list(self.shape(kind))}, expected {expected}")

    def check_scale(self, kind: str, *shapes: tuple[int, ...]) -> None:
        self.check(kind, _SCALES, *shapes)

    def main_shape(self, *dtypes: np.dtype) -> tuple[int, int]:
        """Returns the shape of the tensor that has the integers, after checks."""
        shape = self.shape(self._main)
        if len(shape) != 2 or not all(shape):
            raise self.error(self._main, f"has shape {list(shape)}, expected rows and columns")
        self.check(self._main, dtypes, shape)
        return shape[0], shape[1]

    def groups(self, scheme: WeightScheme, inputs: int) -> int:
        """Returns the number of groups.

        Raises:
            CheckpointError: they do not divide the inputs.
        """
        size = scheme.group_size or inputs
        if inputs % size:
            raise self.error(
                self._main,
                f"has {inputs} inputs, which the groups of quantization_config do not divide: "
                f"group_size={size}",
            )
        return inputs // size

    def read_scale(self, kind: str, rows: Sequence[slice] | None = None) -> Float[np.ndarray, "..."]:
        """Returns scales in float32.

        Raises:
            CheckpointError: some are zero or not finite.
        """
        scale = self.read(kind, rows).astype(np.float32)
        if not np.isfinite(scale).all() or not scale.all():
            raise self.error(kind, "has scales that are 0, infinite or NaN; fetch the file again")
        return scale

    def read_order(self, kind: str, groups: int) -> Int32[np.ndarray, " in"] | None:
        """Returns the inputs sorted by group; None if they are in order or if there is no such tensor.

        Raises:
            CheckpointError: a group does not exist or has another number of inputs.
        """
        if kind not in self:
            return None
        g_idx = self.read(kind)
        if kind == "weight_g_idx" and (g_idx == -1).all():  # compressed-tensors has not set it
            return None
        try:
            return input_order(g_idx, groups)
        except ValueError as error:
            raise self.error(kind, str(error)) from error

    def check_bias(self) -> None:
        """Raises CheckpointError if a module without biases has others than the zeros of some packers."""
        if not self._has_bias and "bias" in self and self.read("bias").any():
            raise self.error("bias", "has numbers other than 0; the model has no such bias")

    def _name(self, kind: str) -> str:
        return f"{self._module}.{kind}"
