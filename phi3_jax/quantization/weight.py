"""The quantized weight of a model, on its devices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [*outputs, in] as `(values - zero) * scale`, with a scale for each group of adjacent inputs.

    4-bit values are int4 on TPU and GPU, where two of them take a byte. XLA's CPU back end gives each a byte,
    so there they are packed into uint8 [*outputs, in / 2], as `value + 8`, the earlier input in the lower
    half.

    With `order`, column i of the values belongs to input `order[i]`.
    """

    values: Int[Array, "..."] | Float[Array, "..."]
    """int8, int4, float8_e4m3fn, or packed uint8."""
    scale: Float[Array, "*outputs groups"]
    """float32."""
    zero: Float[Array, "*outputs groups"] | None = None
    """float32; None: 0."""
    order: Int[Array, " in"] | None = None

    @property
    def packed(self) -> bool:
        """Whether two values share a byte of uint8."""
        return self.values.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, [*outputs, in]."""
        *outputs, columns = self.values.shape
        return (*outputs, 2 * columns if self.packed else columns)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        """The number of the weight's elements."""
        return self.values.size * (2 if self.packed else 1)

    @property
    def groups(self) -> int:
        return self.scale.shape[-1]

    def unpacked(self) -> Array:
        """Returns the values, one an element, [*outputs, in]."""
        if not self.packed:
            return self.values
        low = (self.values & 15).astype(jnp.int8) - jnp.int8(8)
        high = (self.values >> 4).astype(jnp.int8) - jnp.int8(8)
        return jnp.stack([low, high], axis=-1).reshape(self.shape)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Float[Array, "*outputs in"]:
        """Returns the weight, computed in float32 and rounded to `dtype`; its columns stay in `order`."""
        *outputs, columns = self.shape
        grouped = self.unpacked().astype(jnp.float32).reshape(*outputs, self.groups, -1)
        if self.zero is not None:
            grouped = grouped - self.zero[..., None]
        return (grouped * self.scale[..., None]).reshape(*outputs, columns).astype(dtype)
