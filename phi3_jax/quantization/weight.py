"""The quantized weight of a model, on its devices."""

from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[*outputs, in]` as `(values - zero) * scale`, with a scale for each group of adjacent inputs.

    There are two arrangements. The plain one has values `[*outputs, in]` and scales `[*outputs, groups]`. On
    TPU and GPU, weights with several groups have values `[groups, *outputs, size]` and scales
    `[groups, *outputs]`: there the product is one for each group, and the scales are applied to its results.

    4-bit values are int4 on TPU and GPU, where two of them take a byte. XLA's CPU back end gives each a byte,
    so there they are packed into uint8 `[*outputs, in / 2]`, as `value + 8`, the earlier input in the lower
    half.

    With `order`, column i of the values belongs to input `order[i]`.
    """

    values: Int[Array, "..."] | Float[Array, "..."]
    """int8, int4, float8_e4m3fn, or packed uint8."""
    scale: Float[Array, "..."]
    """float32."""
    zero: Float[Array, "..."] | None = None
    """float32, of the shape of `scale`; None: 0."""
    order: Int[Array, " in"] | None = None
    int8_activations: bool = field(default=False, metadata={"static": True})
    """Whether the product rounds each row of activations to int8.

    Such a weight is int8, with a scale for each output and no zero.
    """

    @property
    def packed(self) -> bool:
        """Whether two values share a byte of uint8."""
        return self.values.dtype == jnp.uint8

    @property
    def grouped(self) -> bool:
        """Whether the groups are the first axis."""
        return self.values.ndim > self.scale.ndim

    @property
    def groups(self) -> int:
        return self.scale.shape[0 if self.grouped else -1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, `[*outputs, in]`."""
        if self.grouped:
            groups, *outputs, size = self.values.shape
            return (*outputs, groups * size)
        *outputs, columns = self.values.shape
        return (*outputs, 2 * columns if self.packed else columns)

    @property
    def ndim(self) -> int:
        return self.scale.ndim

    @property
    def size(self) -> int:
        """The number of the weight's elements."""
        return self.values.size * (2 if self.packed else 1)

    def leaf_axes(self, axes: tuple[str, ...]) -> Any:
        """Returns the logical axes of every array, for a weight whose own are `axes`.

        The groups are divided like the inputs, if there are several.
        """
        *outputs, inputs = axes
        if self.grouped:
            values: tuple[str | None, ...] = (inputs, *outputs, None)
            scale: tuple[str | None, ...] = (inputs, *outputs)
        else:
            values, scale = axes, (*outputs, inputs if self.groups > 1 else None)
        return QuantizedWeight(
            values=cast(Array, values),
            scale=cast(Array, scale),
            zero=None if self.zero is None else cast(Array, scale),
            order=None if self.order is None else cast(Array, (None,)),
            int8_activations=self.int8_activations,
        )

    def unpacked(self) -> Array:
        """Returns the values, one an element."""
        if not self.packed:
            return self.values
        low = (self.values & 15).astype(jnp.int8) - jnp.int8(8)
        high = (self.values >> 4).astype(jnp.int8) - jnp.int8(8)
        return jnp.stack([low, high], axis=-1).reshape(self.shape)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Float[Array, "*outputs in"]:
        """Returns the weight, computed in float32 and rounded to `dtype`; its columns stay in `order`."""
        values = self.unpacked().astype(jnp.float32)
        if not self.grouped:
            values = values.reshape(*self.shape[:-1], self.groups, -1)
        if self.zero is not None:
            values = values - self.zero[..., None]
        values = values * self.scale[..., None]
        if self.grouped:
            values = jnp.moveaxis(values, 0, -2)
        return values.reshape(self.shape).astype(dtype)

    def floats(self) -> Float[Array, "*outputs in"]:
        """Returns the weight in float32, its columns in the order of the inputs."""
        weight = self.dequantize()
        return weight if self.order is None else jnp.zeros_like(weight).at[..., self.order].set(weight)

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "... in"]:
        """Returns rows of a weight [rows, in], in float32; an id beyond them gives the last one."""
        axis = 1 if self.grouped else 0
        taken = jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=axis, mode="clip"), self)
        return taken.dequantize()
