"""The parts that a decoder layer is made of: projection, norm, embedding, dropout, activations."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}
"""Activations under the names that `hidden_act` may have."""


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function called `name` in a `config.json`.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not known; use one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def pad_single_row(x: Float[Array, "... R D"]) -> Float[Array, "... rows D"]:
    """`x` with a row of zeros below its only row, if it has 16 bits; otherwise `x`.

    XLA's CPU back end turns the product of one such row into a matrix-vector loop, ten times slower than its
    matrix product. On TPU and GPU the second row is free: their tiles have more rows than that.
    """
    if x.shape[-2] != 1 or x.dtype.itemsize != 2:
        return x
    return jnp.concatenate([x, jnp.zeros_like(x)], axis=-2)


def matmul(x: Float[Array, "... R D"], weight: Float[Array, "O D"]) -> Float[Array, "... R O"]:
    """`x @ weight.T`, accumulated and returned in float32."""
    rows = x.shape[-2]
    operand = pad_single_row(x) if math.prod(x.shape[:-1]) == 1 else x
    y = jax.lax.dot_general(
        operand, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y[..., :rows, :]


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate); no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


@partial(jax.jit, static_argnames=("shape", "std", "dtype"))
def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Numbers from a normal distribution around 0, drawn in float32."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """A projection from axes `inputs` to axes `outputs`, either of which may be several.

    The weight has shape (*outputs, *inputs), the checkpoint's [out, in] with its axes told apart, so that a
    mesh axis can divide heads without cutting through one.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        std: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        bias: bool = False,
    ):
        self.input_axes = len(inputs)
        shape = (*outputs.values(), *inputs.values())
        weight = (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
        self.weight = nnx.Param(weight, axes=(*outputs, *inputs))
        self.bias = nnx.Param(jnp.zeros(shape[: len(outputs)], dtype), axes=tuple(outputs)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """[..., *inputs] -> [..., *outputs] in float32."""
        lead = x.shape[: x.ndim - self.input_axes]
        weight = self.weight[...]
        output_shape = weight.shape[: weight.ndim - self.input_axes]
        weight = weight.reshape(math.prod(output_shape), -1)
        y = matmul(x.reshape(*lead, weight.shape[1]), weight).reshape(*lead, *output_shape)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; the weight multiplies after the cast back, as in the reference."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embeddings [V, D]; the padding row starts at zero and gets no gradient from look-ups."""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        padding_idx: int | None,
        std: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        self.padding_idx = padding_idx
        weight = (std * jax.random.normal(rngs.params(), (num_embeddings, features), jnp.float32)).astype(
            dtype
        )
        if padding_idx is not None:
            weight = weight.at[padding_idx].set(0)
        self.weight = nnx.Param(weight, axes=("vocab", "embed"))

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = jnp.take(self.weight[...], ids, axis=0, mode="clip")
        if self.padding_idx is None:
            return x
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)
