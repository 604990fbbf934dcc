"""Vectors stored as int8 with one scale each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedVectors:
    """Vectors as int8 times one scale a vector, half the bytes of bfloat16.

    The scale is the largest element over 127, rounded to bfloat16 before the vector is divided by it. The
    error is then that of rounding to int8: at most half a scale, 1/253 of the vector's largest element.
    """

    values: Int8[Array, "*vectors H"]
    scale: BFloat16[Array, "*vectors"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "QuantizedVectors":
        return cls(values=jnp.zeros(shape, jnp.int8), scale=jnp.zeros(shape[:-1], jnp.bfloat16))

    @classmethod
    def quantize(cls, vectors: Float[Array, "*vectors H"]) -> "QuantizedVectors":
        vectors = vectors.astype(jnp.float32)
        scale = jnp.max(jnp.abs(vectors), axis=-1) / 127
        # XLA may leave out a cast to bfloat16 and back.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
        divisor = jnp.where(scale == 0, 1, scale)[..., None]
        values = jnp.clip(jnp.round(vectors / divisor), -127, 127).astype(jnp.int8)
        return cls(values=values, scale=scale.astype(jnp.bfloat16))

    def dequantize(self) -> Float[Array, "*vectors H"]:
        """Returns the vectors in float32."""
        return self.values.astype(jnp.float32) * self.scale[..., None].astype(jnp.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype
