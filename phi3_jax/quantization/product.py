"""The product with a quantized weight."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from phi3_jax.native.product import is_faster, product
from phi3_jax.quantization import kernel
from phi3_jax.quantization.weight import QuantizedWeight

FEW_ROWS = 32
"""The most rows for which XLA's product per group is faster on TPU than other ways."""


def quantized_product(
    x: Float[Array, "*rows in"], weight: QuantizedWeight, dtype: jnp.dtype, *, alone: bool
) -> Float[Array, "..."]:
    """Returns the product [*rows, *outputs] with the dequantized weight, summed in float32, in `dtype`.

    With `int8_activations` the rows of `x` are rounded to integers first, and summed in int32, on a CPU
    perhaps in float32. The product has a gradient for `x`, that of the product without rounded activations,
    and none for the weight. `alone` says that no mesh divides the arrays, so that kernels can take them.
    """
    if weight.order is not None:
        x = jnp.take(x, weight.order, axis=-1)
    return _product(x, weight, dtype, alone)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, weight: QuantizedWeight, dtype: jnp.dtype, alone: bool) -> Array:
    if weight.int8_activations:
        return _rounded_product(x, weight, alone).astype(dtype)
    count = math.prod(x.shape[:-1])
    is_few = isinstance(count, int) and count <= FEW_ROWS  # `jax.export` may leave the number open
    default: Any = partial(_by_xla, dtype=dtype, is_few=is_few)
    if alone and _library_fits(x, weight) and is_faster(count, packed=True):
        return jax.lax.platform_dependent(x, weight, cpu=partial(_by_library, dtype=dtype), default=default)
    if alone and not is_few and _kernel_fits(x, weight):
        return jax.lax.platform_dependent(x, weight, tpu=partial(_by_kernel, dtype=dtype), default=default)
    return default(x, weight)


def round_rows(x: Float[Array, "*rows in"]) -> tuple[Int8[Array, "*rows in"], Float32[Array, "*rows 1"]]:
    """Returns each row as integers of -127 to 127, and the scales with which they are multiplied.

    A row of zeros stays zeros. A row with NaN has the scale NaN, one with infinity the scale infinity: its
    products are not finite, whatever the integers are.
    """
    wide = x.astype(jnp.float32)
    # On a mesh that divides the inputs, this is the maximum of the whole row.
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    # A scale below the least normal number would count as zero. XLA replaces divisions by such factors, but
    # not in all programs.
    scale = jnp.maximum(largest * np.float32(1 / 127), jnp.finfo(jnp.float32).tiny)
    return jnp.round(wide * (1 / scale)).astype(jnp.int8), scale


def _rounded_product(x: Array, weight: QuantizedWeight, alone: bool) -> Array:
    """Multiplies rounded activations by the integers of the weight; all scales are applied to the result.

    Sums in int32 are exact, however a mesh divides the inputs. The C++ library sums in float32, which is
    exact up to 2**24, and so for 1,040 inputs of any size.
    """
    integers, scale = round_rows(x)
    if alone:
        is_fast = is_faster(math.prod(x.shape[:-1]), packed=True)
        cpu = _library_sums if is_fast else _flat_int32_sums
        y = jax.lax.platform_dependent(integers, weight, cpu=cpu, default=_int32_sums)
    else:
        y = _int32_sums(integers, weight)
    return y * scale.reshape(*x.shape[:-1], *(1 for _ in weight.shape[:-1]))


def _library_sums(x: Array, weight: QuantizedWeight) -> Array:
    """Returns float32 sums of integers, times the weight's scales."""
    return _by_library(x.astype(jnp.bfloat16), weight, jnp.dtype(jnp.float32))


def _int32_sums(x: Array, weight: QuantizedWeight) -> Array:
    """Returns int32 sums of integers, times the weight's scales."""
    y = _dot(x, weight.values, jnp.dtype(jnp.int32)).astype(jnp.float32)
    return y * _across(weight.scale[..., 0], y.ndim)


def _flat_int32_sums(x: Array, weight: QuantizedWeight) -> Array:
    """Multiplies matrices of at least two rows.

    XLA's CPU back end copies a weight that is not flat, and computes one row by a loop, thirty times slower.
    """
    rows, outputs, columns = x.shape[:-1], weight.shape[:-1], x.shape[-1]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), weight)
    x = x.reshape(-1, columns)
    if math.prod(rows) == 1:
        return _int32_sums(jnp.broadcast_to(x, (2, columns)), flat)[:1].reshape(*rows, *outputs)
    return _int32_sums(x, flat).reshape(*rows, *outputs)


def _by_xla(x: Array, weight: QuantizedWeight, dtype: jnp.dtype, is_few: bool) -> Array:
    rows, columns = x.shape[:-1], x.shape[-1]
    if not weight.grouped and math.prod(rows) == 1 and x.dtype.itemsize == 2:
        # XLA's CPU back end computes one 16-bit row by a loop, ten times slower than its matrix product.
        pair = jnp.broadcast_to(x.reshape(1, columns), (2, columns))
        return _by_xla(pair, weight, dtype, is_few)[:1].reshape(*rows, *weight.shape[:-1])
    if weight.groups == 1:
        return _scaled_after(x, weight, dtype)
    if weight.grouped and is_few:
        return _scaled_by_group(x, weight, dtype)
    return _dequantized_before(x, weight, dtype)


def _library_fits(x: Array, weight: QuantizedWeight) -> bool:
    if weight.grouped or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    return weight.packed or (weight.values.dtype == jnp.int8 and weight.zero is None)


def _by_library(x: Array, weight: QuantizedWeight, dtype: jnp.dtype) -> Array:
    *outputs, columns = weight.values.shape
    by_group = (math.prod(outputs), weight.groups)
    zero = None if weight.zero is None else weight.zero.reshape(by_group)
    values, scale = weight.values.reshape(-1, columns), weight.scale.reshape(by_group)
    y = product(x.reshape(-1, x.shape[-1]), values, scale, zero)
    return y.reshape(*x.shape[:-1], *outputs).astype(dtype)


def _kernel_fits(x: Array, weight: QuantizedWeight) -> bool:
    if not weight.grouped or x.dtype != jnp.bfloat16:
        return False
    _, *outputs, size = weight.values.shape
    has_wide_zero = weight.zero is not None and weight.values.dtype == jnp.int8
    return not has_wide_zero and kernel.fits(math.prod(outputs), size)


def _scaled_after(x: Array, weight: QuantizedWeight, dtype: jnp.dtype) -> Array:
    """Multiplies with the integers; a scale for each output is applied to the result."""
    values, zero = _split(weight, x.dtype)
    y = _dot(x, values, dtype).astype(jnp.float32)
    if zero is not None:
        sums = jnp.sum(x, axis=-1, dtype=jnp.float32)
        y = y - jnp.expand_dims(sums, range(sums.ndim, y.ndim)) * _across(zero[..., 0], y.ndim)
    return (y * _across(weight.scale[..., 0], y.ndim)).astype(dtype)


def _split(weight: QuantizedWeight, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """Returns what is multiplied, and the zeros that are subtracted from the product.

    Zeros of 8 bits are subtracted before, exactly: afterwards, the difference of two sums that may be a
    hundred times larger would lose two decimals.
    """
    values = weight.unpacked().astype(dtype)
    if weight.zero is None or weight.values.dtype != jnp.int8:
        return values, weight.zero
    return values - weight.zero[..., None if weight.grouped else slice(None)].astype(dtype), None


def _dequantized_before(x: Array, weight: QuantizedWeight, dtype: jnp.dtype) -> Array:
    return _dot(x, weight.dequantize(x.dtype), dtype)


def _scaled_by_group(x: Array, weight: QuantizedWeight, dtype: jnp.dtype) -> Array:
    """Multiplies each group's integers, then sums over the groups with their scales.

    On TPU the scales of a weight that is dequantized first are multiplied on the vector unit, which takes
    longer than to read the weight.
    """
    groups, *outputs, size = weight.values.shape
    by_group = x.reshape(*x.shape[:-1], groups, size)
    lead = x.ndim - 1
    values, zero = _split(weight, x.dtype)
    y = jax.lax.dot_general(
        by_group,
        values,
        (((lead + 1,), (values.ndim - 1,)), ((lead,), (0,))),
        preferred_element_type=jnp.float32,
    )  # [groups, *rows, *outputs]
    apart = (groups, *(1 for _ in range(lead)), *outputs)
    if zero is not None:
        sums = jnp.moveaxis(jnp.sum(by_group, axis=-1, dtype=jnp.float32), -1, 0)
        y = y - jnp.expand_dims(sums, range(sums.ndim, y.ndim)) * zero.reshape(apart)
    return jnp.sum(y * weight.scale.reshape(apart), axis=0).astype(dtype)


def _by_kernel(x: Array, weight: QuantizedWeight, dtype: jnp.dtype) -> Array:
    groups, *outputs, size = weight.values.shape
    scale, zero = (None if leaf is None else leaf.reshape(groups, -1) for leaf in (weight.scale, weight.zero))
    assert scale is not None
    rows = x.reshape(-1, x.shape[-1])
    y = kernel.grouped_product(rows, weight.values.reshape(groups, -1, size), scale, zero)
    return y.reshape(*x.shape[:-1], *outputs).astype(dtype)


def _dot(x: Array, weight: Array, dtype: jnp.dtype) -> Array:
    axes = ((x.ndim - 1,), (weight.ndim - 1,)), ((), ())
    return jax.lax.dot_general(x, weight, axes, preferred_element_type=dtype)


def _across(x: Array, ndim: int) -> Array:
    return jnp.expand_dims(x.astype(jnp.float32), range(ndim - x.ndim))


def _product_forward(
    x: Array, weight: QuantizedWeight, dtype: jnp.dtype, alone: bool
) -> tuple[Array, tuple[QuantizedWeight, Array]]:
    return _product(x, weight, dtype, alone), (weight, jnp.zeros((0,), x.dtype))


def _product_backward(
    dtype: jnp.dtype, alone: bool, saved: tuple[QuantizedWeight, Array], gradient: Array
) -> tuple[Array, None]:
    weight, like = saved
    outputs = weight.ndim - 1
    lead = gradient.ndim - outputs
    if weight.groups == 1 and weight.zero is None:
        scaled = gradient.astype(jnp.float32) * _across(weight.scale[..., 0], gradient.ndim)
        operand = weight.unpacked().astype(like.dtype)
    else:
        scaled, operand = gradient, weight.dequantize(like.dtype)
    axes = (tuple(range(lead, gradient.ndim)), tuple(range(outputs))), ((), ())
    of_x = jax.lax.dot_general(scaled.astype(like.dtype), operand, axes, preferred_element_type=dtype)
    return of_x.astype(like.dtype), None


_product.defvjp(_product_forward, _product_backward)
