"""Multiplies by a packed weight with the C++ library."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from phi3_jax.native.targets import PRODUCT, available, variant

MOST_ROWS = 256
"""The rows up to which the product with bfloat16 weights takes no longer than XLA's."""

MOST_ROWS_NARROW = 16
"""The same with vectors of 16 bytes, and without Arm's instructions for any weights."""

EXACT_ROWS = 16
"""The rows up to which scales of groups are applied to sums of integers."""


def is_faster(rows: Any, *, packed: bool) -> bool:
    """Whether `product` is available, and takes no longer than XLA's product of this many rows.

    `packed` says that the weights are integers, which XLA widens first. False for an open number of rows, as
    `jax.export` has it, and for none. The numbers of rows were measured on x86; on Arm they are a guess,
    which leaves many rows of bfloat16 weights to XLA.
    """
    if not isinstance(rows, int) or rows < 1 or not available():
        return False
    name = variant()
    if name == "portable":
        return rows <= MOST_ROWS_NARROW
    return packed or rows <= (MOST_ROWS_NARROW if name in ("neon", "neonbf16") else MOST_ROWS)


def product(
    x: Float[Array, "rows inputs"],
    weight: Num[Array, "outputs packed"],
    scale: Float32[Array, "outputs groups"] | None = None,
    zero: Float32[Array, "outputs groups"] | None = None,
) -> Float32[Array, "rows outputs"]:
    """Returns `x` times the transpose of a weight, with sums in float32.

    It works if it is `available()`, in programs for one CPU or within `shard_map`; `is_faster` says for how
    many rows it pays. Callers choose it with
    `jax.lax.platform_dependent(..., cpu=product)`. It has no gradient. The bytes of a row of the result do
    not depend on the number of rows or threads, but weights in groups are multiplied by their scales and
    rounded to bfloat16 for more than `EXACT_ROWS` rows of bfloat16. With such rows, some processors count
    bfloat16 numbers below 1.2e-38 as zero.

    Args:
        x: float32 or bfloat16.
        weight: bfloat16 [outputs, inputs]; int8 [outputs, inputs], numbers q for weights q * scale; or uint8
            [outputs, inputs / 2], two numbers q of 4 bits in a byte, as q + 8, the first input in the lower
            ones, for weights (q - zero) * scale.
        scale: for int8 and uint8, of each output and group of neighbouring inputs. Groups have one size.
        zero: likewise, for uint8; None: 0.

    Raises:
        ValueError: dtypes or shapes do not fit each other.
    """
    operands = [operand for operand in (x, weight, scale, zero) if operand is not None]
    if not _fit(x, weight, scale, zero):
        shapes = ", ".join(f"{operand.dtype}{list(operand.shape)}" for operand in operands)
        raise ValueError(
            f"product({shapes}): expected rows [rows, inputs] and a weight bfloat16 [outputs, inputs]; int8 "
            "[outputs, inputs] with scale float32 [outputs, groups]; or uint8 [outputs, inputs / 2] with "
            "scale and perhaps zero, where groups divide inputs"
        )
    return _product(*operands)


def _fit(x: Array, weight: Array, scale: Array | None, zero: Array | None) -> bool:
    if x.ndim != 2 or weight.ndim != 2 or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    packed = 2 if weight.dtype == jnp.uint8 else 1
    if x.shape[1] != weight.shape[1] * packed or weight.dtype not in (jnp.bfloat16, jnp.int8, jnp.uint8):
        return False
    if weight.dtype == jnp.bfloat16:
        return scale is None and zero is None
    if scale is None or (zero is not None and weight.dtype != jnp.uint8):
        return False
    groups = scale.shape[-1] if scale.ndim else 0
    return all(
        each.dtype == jnp.float32 and each.shape == (weight.shape[0], groups)
        for each in (scale, zero)
        if each is not None
    ) and (groups > 0 and x.shape[1] % groups == 0)


@jax.custom_batching.custom_vmap
def _product(*operands: Array) -> Array:
    result = jax.eval_shape(_result, *operands[:2])
    return jax.ffi.ffi_call(PRODUCT, result)(*operands)


def _result(x: Array, weight: Array) -> Array:
    """Returns an array like the product, of which `shard_map` knows over which axes it varies."""
    return x[:, :1].astype(jnp.float32) + weight[:, :1].astype(jnp.float32).T


@_product.def_vmap
def _product_of_batch(axis_size: int, in_batched: Sequence[bool], *operands: Array) -> tuple[Array, bool]:
    """Multiplies all rows of the batch at once, or one element after the other if the weight differs."""
    if not any(in_batched[1:]):
        x, *weight = operands
        rows = _product(x.reshape(axis_size * x.shape[1], x.shape[2]), *weight)
        return rows.reshape(axis_size, x.shape[1], rows.shape[1]), True

    def one(batched: list[Array]) -> Any:
        elements = iter(batched)
        return _product(*(next(elements) if is_batched else each for is_batched, each in pairs))

    pairs = list(zip(in_batched, operands, strict=True))
    return jax.lax.map(one, [each for is_batched, each in pairs if is_batched]), True
