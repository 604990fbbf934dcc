"""A Pallas TPU kernel for the product of many rows with a weight in groups."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from phi3_jax.sizes import ceil_div, round_up

SUBLANES = 16
"""Rows of a tile of 16-bit numbers."""

ROW_BLOCK = 512
"""Rows of a grid step; from 256 on, the MXU is slower than the reading of the weight."""

OUTPUT_BLOCK = 512
"""Outputs of a grid step; with 512 rows their float32 sums take 1 MB of VMEM."""

GROUP_BLOCK = 8
"""Groups of a grid step: whole tiles of scales."""


def fits(out: int, size: int) -> bool:
    """Whether the kernel takes a weight of so many outputs, and inputs of a group."""
    return size % 128 == 0 and out % 128 == 0


def grouped_product(
    x: Float[Array, "rows in"],
    values: Int[Array, "groups out size"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Returns the product with `(values - zero) * scale`, summed and returned in float32.

    Integers become floats in VMEM, where the scales are applied to the product of each group, so that the
    memory outside sees neither a wider weight nor the products.
    """
    groups, out, size = values.shape
    count = x.shape[0]
    rows = min(round_up(count, SUBLANES), ROW_BLOCK)
    # Where the last block has fewer groups, it reads any integers, which count 0 times 0.
    steps = ceil_div(groups, GROUP_BLOCK)
    spare = steps * GROUP_BLOCK - groups
    x = jnp.pad(x, ((0, round_up(count, rows) - count), (0, spare * size)))
    scale = jnp.pad(scale, ((0, spare), (0, 0)))
    outputs = next(block for block in (OUTPUT_BLOCK, 384, 256, 128) if out % block == 0)
    by_group = pl.BlockSpec((GROUP_BLOCK, outputs), lambda r, o, g: (g, o))
    operands = [x, values, scale]
    specs = [
        pl.BlockSpec((rows, GROUP_BLOCK * size), lambda r, o, g: (r, g)),
        pl.BlockSpec((GROUP_BLOCK, outputs, size), lambda r, o, g: (g, o, 0)),
        by_group,
    ]
    if zero is not None:
        operands.append(jnp.pad(zero, ((0, spare), (0, 0))))
        specs.append(by_group)
    y = pl.pallas_call(
        partial(_kernel, size, zero is not None),
        grid=(x.shape[0] // rows, out // outputs, steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, outputs), lambda r, o, g: (r, o)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="grouped_product",
        interpret=interpret,
    )(*operands)
    return y[:count]


def _kernel(
    size: int, has_zero: bool, x_ref: jax.Ref, values_ref: jax.Ref, scale_ref: jax.Ref, *refs: jax.Ref
) -> None:
    y_ref = refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        y_ref[...] = jnp.zeros_like(y_ref)

    total = y_ref[...]
    for group in range(GROUP_BLOCK):
        x = x_ref[:, group * size : (group + 1) * size]
        values = values_ref[group].astype(x.dtype)
        part = jax.lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if has_zero:
            sums = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
            part = part - sums * refs[0][group][None]
        total = total + part * scale_ref[group][None]
    y_ref[...] = total
