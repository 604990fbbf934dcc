"""Quantized weights in NumPy, in the checkpoint's order of rows: what formats are read into and written from."""

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from phi3_jax.errors import UserError
from phi3_jax.quantization.scheme import Quantization


class WeightForm(NamedTuple):
    """What a checkpoint's headers tell about a quantized weight."""

    bits: int
    """4 or 8."""
    groups: int
    """The number of groups of inputs."""
    has_zero: bool = False
    """Whether each group has a zero point."""
    has_order: bool = False
    """Whether the inputs are stored in another order."""
    is_float: bool = False
    """Whether the values are float8_e4m3fn."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight [out, in] as `(values - zero) * scale`, with a scale for each group of consecutive inputs.

    With `order`, column i of the values belongs to input `order[i]`.
    """

    values: Int[np.ndarray, "out in"] | Float[np.ndarray, "out in"]
    """int8, of which 4 bits use -8 to 7, or float8_e4m3fn."""
    scale: Float[np.ndarray, "out groups"]
    """float32."""
    bits: int
    zero: Float[np.ndarray, "out groups"] | None = None
    """float32; None: 0."""
    order: Int[np.ndarray, " in"] | None = None

    @property
    def form(self) -> WeightForm:
        return WeightForm(
            bits=self.bits,
            groups=self.scale.shape[1],
            has_zero=self.zero is not None,
            has_order=self.order is not None,
            is_float=self.values.dtype == ml_dtypes.float8_e4m3fn,
        )

    def dequantize(self) -> Float[np.ndarray, "out in"]:
        """Returns the weight in float32, its inputs in their own order."""
        rows, columns = self.values.shape
        grouped = self.values.astype(np.float32).reshape(rows, self.scale.shape[1], -1)
        if self.zero is not None:
            grouped -= self.zero[:, :, None]
        grouped *= self.scale[:, :, None]
        weight = grouped.reshape(rows, columns)
        if self.order is None:
            return weight
        whole = np.empty_like(weight)
        whole[:, self.order] = weight
        return whole


def round_weight(weight: Float[np.ndarray, "out in"], quantization: Quantization, name: str) -> StoredWeight:
    """Rounds a weight to the nearest values of the quantization.

    Scales are rounded to bfloat16 before they are used, so that a checkpoint holds exactly these. A symmetric
    group of 4 bits gives its largest element the integer -8, so its scale may be negative.

    Args:
        weight: of any float dtype.
        quantization: says how.
        name: the weight's name, for messages.

    Raises:
        UserError: the groups do not divide the inputs, or numbers are not finite.
    """
    rows, columns = weight.shape
    size = quantization.group_size or columns
    if columns % size:
        fitting = [n for n in range(8, columns + 1, 8) if columns % n == 0]
        near = sorted(fitting, key=lambda n: abs(n - size))[:4]
        raise UserError(
            f"{name} has {columns} inputs, which groups of {size} do not divide; use "
            f"group_size={' or '.join(map(str, sorted(near))) or 'none'}"
        )
    grouped = weight.astype(np.float32).reshape(rows, -1, size)
    largest, smallest = grouped.max(axis=2), grouped.min(axis=2)
    if not np.isfinite(largest).all() or not np.isfinite(smallest).all():
        raise UserError(f"{name} has numbers that are not finite, which cannot be quantized")
    low, high = (-8, 7) if quantization.bits == 4 else (-127, 127)
    zero = None
    if not quantization.symmetric:
        low = -8 if quantization.bits == 4 else -128
        largest, smallest = np.maximum(largest, 0), np.minimum(smallest, 0)
        scale = _bfloat16((largest - smallest) / (high - low))
        divisor = np.where(scale == 0, np.float32(1), scale)
        zero = np.clip(np.rint(low - smallest / divisor), low, high).astype(np.float32)
    elif quantization.bits == 4:
        extreme = np.where(largest > -smallest, largest, smallest)
        scale = _bfloat16(extreme / low)
        divisor = np.where(scale == 0, np.float32(1), scale)
    else:
        scale = _bfloat16(np.maximum(largest, -smallest) / high)
        divisor = np.where(scale == 0, np.float32(1), scale)
    grouped = grouped / divisor[:, :, None]
    if zero is not None:
        grouped += zero[:, :, None]
    np.rint(grouped, out=grouped)
    np.clip(grouped, low, high, out=grouped)
    values = grouped.astype(np.int8).reshape(rows, columns)
    return StoredWeight(values=values, scale=scale, bits=quantization.bits, zero=zero)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)
