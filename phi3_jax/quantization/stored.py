"""Quantized weights in NumPy, between the formats of checkpoints and the devices, and rounding to them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from phi3_jax.errors import UserError
from phi3_jax.quantization.scheme import Quantization, WeightForm

BLOCK = 1 << 22
"""The elements that are rounded at once."""


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
    int8_activations: bool = False
    """Whether its product rounds activations to int8."""

    @property
    def form(self) -> WeightForm:
        return WeightForm(
            bits=self.bits,
            groups=self.scale.shape[1],
            has_zero=self.zero is not None,
            has_order=self.order is not None,
            is_float=self.values.dtype == ml_dtypes.float8_e4m3fn,
            int8_activations=self.int8_activations,
        )

    def take_rows(self, runs: Sequence[slice]) -> "StoredWeight":
        """Returns these runs of rows, concatenated."""
        if len(runs) == 1 and runs[0] == slice(0, len(self.values)):
            return self

        def take(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array[run] for run in runs])

        zero = None if self.zero is None else take(self.zero)
        return replace(self, values=take(self.values), scale=take(self.scale), zero=zero)

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
    form = quantization.form(name, columns)
    groups = form.groups
    values = np.empty((rows, columns), np.int8)
    scale = np.empty((rows, groups), np.float32)
    zero = None if quantization.symmetric else np.empty((rows, groups), np.float32)
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        part = weight[block].astype(np.float32).reshape(-1, groups, columns // groups)
        rounded, scale[block], zeros = _round(part, quantization, name)
        values[block] = rounded.reshape(-1, columns)
        if zero is not None:
            zero[block] = zeros
    return StoredWeight(values, scale, quantization.bits, zero=zero, int8_activations=form.int8_activations)


def _round(
    grouped: Float[np.ndarray, "rows groups size"], quantization: Quantization, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns the values in float32, the scales and the zeros of some rows, which are overwritten."""
    scale, zero = choose_scales(grouped, quantization, name)
    grouped /= scale[:, :, None]
    if zero is not None:
        grouped += zero[:, :, None]
    np.rint(grouped, out=grouped)
    np.clip(grouped, *limits(quantization), out=grouped)
    return grouped, scale, zero


def limits(quantization: Quantization) -> tuple[int, int]:
    """Returns the least and the greatest value."""
    if quantization.bits == 4:
        return -8, 7
    return (-127 if quantization.symmetric else -128), 127


def choose_scales(
    grouped: Float[np.ndarray, "rows groups size"], quantization: Quantization, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the scales and the zeros [rows, groups] with which every element is within the limits.

    Raises:
        UserError: numbers are not finite.
    """
    largest, smallest = grouped.max(axis=2), grouped.min(axis=2)
    if not np.isfinite(largest).all() or not np.isfinite(smallest).all():
        raise UserError(f"{name} has numbers that are not finite, which cannot be quantized")
    low, high = limits(quantization)
    if not quantization.symmetric:
        largest, smallest = np.maximum(largest, 0), np.minimum(smallest, 0)  # zero is one of the values
        scale = _bfloat16((largest - smallest) / (high - low))
    elif quantization.bits == 4:
        scale = _bfloat16(np.where(largest > -smallest, largest, smallest) / low)
    else:
        scale = _bfloat16(np.maximum(largest, -smallest) / high)
    scale = np.where(scale == 0, np.float32(1), scale)  # no reader of checkpoints divides by zero
    if quantization.symmetric:
        return scale, None
    return scale, np.clip(np.rint(low - smallest / scale), low, high).astype(np.float32)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)
