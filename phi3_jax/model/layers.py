"""The parts of a decoder layer: projection, norm, embedding, dropout, activations."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from phi3_jax.errors import UserError
from phi3_jax.native.product import is_faster, product
from phi3_jax.parallel.sharding import gather, place, shards
from phi3_jax.quantization.product import quantized_product
from phi3_jax.quantization.weight import QuantizedWeight

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
"""Activations by the value of `hidden_act`."""


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the activation that `config.json` calls `name`.

    Raises:
        UserError: the name is unknown; the message lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act={name!r} is not known; use one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def pad_single_row(x: Float[Array, "... R D"]) -> Float[Array, "... rows D"]:
    """Returns `x` with a row of zeros after its only row, if it has 16 bits; otherwise `x`.

    XLA's CPU back end computes the product of a single 16-bit row by a matrix-vector loop, ten times slower
    than its matrix product. On TPU and GPU the second row is free: their tiles have more rows.
    """
    if x.shape[-2] != 1 or x.dtype.itemsize != 2:
        return x
    return jnp.concatenate([x, jnp.zeros_like(x)], axis=-2)


def matmul(
    x: Float[Array, "... R D"], weight: Float[Array, "O D"], mesh: Mesh | None = None
) -> Float[Array, "... R O"]:
    """Returns `x @ weight.T`, with sums in float32. `mesh` divides the operands, if there is one."""
    rows = math.prod(x.shape[:-1])
    if mesh is None and x.dtype == weight.dtype == jnp.bfloat16 and is_faster(rows, packed=False):
        return _contract_flat(x, weight, 1, jnp.dtype(jnp.float32))
    operand = pad_single_row(x) if rows == 1 else x
    return contract(operand, weight, 1, jnp.dtype(jnp.float32))[..., : x.shape[-2], :]


def contract(
    x: Float[Array, "..."], weight: Float[Array, "..."], axes: int, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Multiplies [..., *inputs] by [*outputs, *inputs] with `axes` inputs; float32 sums, returned in `dtype`.

    The gradients of 16-bit products are products of 16-bit operands. JAX's rule would widen both operands
    first, which takes twice the time.
    """
    if x.dtype.itemsize >= jnp.dtype(dtype).itemsize:
        return _product(x, weight, axes, dtype)
    return _contract(x, weight, axes, dtype)


def _product(x: Array, weight: Array, axes: int, dtype: jnp.dtype) -> Array:
    lead = x.ndim - axes
    inputs = tuple(range(lead, x.ndim)), tuple(range(weight.ndim - axes, weight.ndim))
    return jax.lax.dot_general(x, weight, (inputs, ((), ())), preferred_element_type=dtype)


def _flat_product(x: Array, weight: Array, axes: int, dtype: jnp.dtype) -> Array:
    """Returns the product of a flat weight, by the C++ library in programs for a CPU."""

    def by_library(x: Array, weight: Array) -> Array:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return product(rows, weight).reshape(*x.shape[:-1], weight.shape[0])

    def by_xla(x: Array, weight: Array) -> Array:
        operand = pad_single_row(x) if math.prod(x.shape[:-1]) == 1 else x
        return _product(operand, weight, axes, dtype)[..., : x.shape[-2], :]

    return jax.lax.platform_dependent(x, weight, cpu=by_library, default=by_xla)


def _with_gradient(multiply: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `multiply(x, weight, axes, dtype)` with the gradient of a 16-bit product."""

    def forward(x: Array, weight: Array, axes: int, dtype: jnp.dtype) -> tuple[Array, Any]:
        return multiply(x, weight, axes, dtype), (x, weight)

    def backward(axes: int, dtype: jnp.dtype, operands: Any, gradient: Array) -> tuple[Array, Array]:
        x, weight = operands
        gradient = gradient.astype(x.dtype)
        lead = x.ndim - axes
        outputs = tuple(range(lead, gradient.ndim)), tuple(range(weight.ndim - axes))
        rows = tuple(range(lead))
        of_x = jax.lax.dot_general(gradient, weight, (outputs, ((), ())), preferred_element_type=dtype)
        of_weight = jax.lax.dot_general(gradient, x, ((rows, rows), ((), ())), preferred_element_type=dtype)
        return of_x.astype(x.dtype), of_weight.astype(weight.dtype)

    contraction = jax.custom_vjp(multiply, nondiff_argnums=(2, 3))
    contraction.defvjp(forward, backward)
    return contraction


_contract = _with_gradient(_product)
_contract_flat = _with_gradient(_flat_product)


def check_layer(name: str, value: Any, old: Any) -> None:
    """Checks that a layer may stand in place of `old`.

    Raises:
        UserError: it is of another class, or its weight has another shape.
    """
    weight = getattr(value, "weight", None)
    if type(value) is not type(old) or weight is None or weight.shape != old.weight.shape:
        shape = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
        raise UserError(
            f"the new {name} are a {type(value).__name__} with {shape}; expected a {type(old).__name__} with "
            f"{list(old.weight.shape)} (resize_token_embeddings changes the vocabulary)"
        )


def across(x: Float[Array, "..."], ndim: int) -> Float[Array, "..."]:
    """Returns `x` with axes of length 1 in front, `ndim` in all, for `jax_numpy_rank_promotion="raise"`."""
    return jnp.expand_dims(x, range(ndim - x.ndim))


def wider_dtype(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """Returns the dtype to which JAX promotes two arrays, also where its promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def last_positions(x: Float[Array, "B T ..."], count: int | None) -> Float[Array, "B kept ..."]:
    """Returns the last `count` positions, or all if it is None."""
    return x if count is None else x[:, -count:]


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate), given a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, jnp.float32(1.0 - rate), x.shape)  # drawn in float32 in every mode
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """Returns `factor` times `x`, in the dtype of `x`; for a factor of 1, `x` itself."""
    return x if factor == 1 else x * factor


def fold_in(key: Key[Array, ""] | None, number: int) -> Key[Array, ""] | None:
    """Returns a key of its own for each number, given a key."""
    return None if key is None else jax.random.fold_in(key, number)


@partial(jax.jit, static_argnames=("shape", "std", "dtype"))
def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Returns draws from a normal distribution around 0, drawn in float32."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def is_alone(mesh: Mesh | None) -> bool:
    """Whether a single device has all of a model."""
    return mesh is None or mesh.size == 1


class QuantizedParam(nnx.Variable[QuantizedWeight]):
    """A quantized weight, which is never trained.

    Its `axes` are those of the weight's outputs, and one for all inputs: the first input axis.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return self.get_value().shape

    def gathered(self, mesh: Mesh | None) -> QuantizedWeight:
        """Returns the weight, gathered along the axis that `fsdp` divides."""
        weight = self.get_value()
        return jax.tree.map(lambda leaf, axes: gather(leaf, mesh, axes), weight, weight.leaf_axes(self.axes))


class Linear(nnx.Module):
    """A projection from one or more axes `inputs` to one or more axes `outputs`.

    The weight has shape (*outputs, *inputs): the checkpoint's [out, in] with separate axes, so that a mesh
    axis divides between heads and never within one. A `bias` starts at numbers between -`bias_bound` and
    `bias_bound`.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        std: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        bias: bool = False,
        bias_bound: float = 0.0,
    ):
        self.inputs = tuple(inputs.items())
        self.mesh = mesh
        shape, axes = (*outputs.values(), *inputs.values()), (*outputs, *inputs)
        weight = (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
        self.weight: nnx.Param | QuantizedParam = nnx.Param(place(weight, mesh, axes), axes=axes)
        values = jnp.zeros(shape[: len(outputs)], dtype) if bias else None
        if values is not None and bias_bound:
            drawn = jax.random.uniform(rngs.params(), values.shape, jnp.float32, -bias_bound, bias_bound)
            values = drawn.astype(dtype)
        self.bias = (
            None if values is None else nnx.Param(place(values, mesh, tuple(outputs)), axes=tuple(outputs))
        )
        self.adapter: Any = nnx.data(None)
        """A module that changes the output, such as `phi3_jax.lora.LoRA`."""

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """The names and sizes of the output axes."""
        count = len(self.weight.axes) - (1 if isinstance(self.weight, QuantizedParam) else self.input_axes)
        return tuple(zip(self.weight.axes[:count], self.weight.shape[:count], strict=True))

    @property
    def input_axes(self) -> int:
        """The number of input axes."""
        return len(self.inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of all axes, also where the quantized weight has a single one for the inputs."""
        return tuple(size for _, size in (*self.outputs, *self.inputs))

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of all axes."""
        return tuple(name for name, _ in (*self.outputs, *self.inputs))

    def floats(self) -> Float[Array, "..."]:
        """Returns the weight [*outputs, *inputs] as floats; a quantized one in float32."""
        if isinstance(self.weight, QuantizedParam):
            return self.weight.get_value().floats().reshape(self.shape)
        return self.weight[...]

    def __call__(self, x: Float[Array, "..."], key: Key[Array, ""] | None = None) -> Float[Array, "..."]:
        """Maps [..., *inputs] to [..., *outputs] in float32; in x's dtype where devices add parts.

        `key` turns the adapter's dropout on.
        """
        y = self.product(x)
        if self.adapter is not None:
            y = self.adapter(x, y, self, key)
        if self.bias is None:
            return y
        bias = gather(self.bias[...], self.mesh, self.bias.axes)
        return y + across(bias.astype(jnp.float32), y.ndim)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the product with the weight, without the bias and the adapter."""
        lead = x.shape[: x.ndim - self.input_axes]
        # A mesh axis that divides inputs leaves each device a part of the sums.
        divided = any(shards(self.mesh, axis) > 1 for axis, _ in self.inputs if axis != "embed")
        dtype = x.dtype if divided else jnp.dtype(jnp.float32)
        if isinstance(self.weight, QuantizedParam):
            quantized = self.weight.gathered(self.mesh)
            rows = x.reshape(*lead, quantized.shape[-1])
            return quantized_product(rows, quantized, dtype, alone=is_alone(self.mesh))
        weight = gather(self.weight[...], self.mesh, self.weight.axes)
        output_shape = weight.shape[: weight.ndim - self.input_axes]
        if self.mesh is None:
            # XLA's CPU back end copies a weight that is not flat.
            flat = weight.reshape(math.prod(output_shape), -1)
            return matmul(x.reshape(*lead, flat.shape[1]), flat).reshape(*lead, *output_shape)
        # In a flat weight, an axis that the mesh divides is not always first, and would be gathered.
        return contract(x, weight, self.input_axes, dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; the weight is applied after the cast back, as in the reference."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, mesh: Mesh | None):
        self.eps = eps
        self.weight = nnx.Param(place(jnp.ones((size,), dtype), mesh, ("norm",)), axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return across(self.weight[...], x.ndim) * normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Norm of mean and variance in float32, with a weight and a bias."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, mesh: Mesh | None):
        self.eps = eps
        self.weight = nnx.Param(place(jnp.ones((size,), dtype), mesh, ("norm",)), axes=("norm",))
        self.bias = nnx.Param(place(jnp.zeros((size,), dtype), mesh, ("norm",)), axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        centered = x.astype(jnp.float32)
        centered = centered - jnp.mean(centered, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        weight, bias = (across(p[...].astype(jnp.float32), x.ndim) for p in (self.weight, self.bias))
        return (centered * jax.lax.rsqrt(variance + self.eps) * weight + bias).astype(x.dtype)


class Embedding(nnx.Module):
    """Token embeddings [V, D]; the padding row starts at zero and gets no gradient from look-ups.

    A `tied` embedding is also the weight of the head, and is divided like one.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        padding_idx: int | None,
        tied: bool,
        std: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        mesh: Mesh | None,
    ):
        self.padding_idx = padding_idx
        self.mesh = mesh
        axes = ("vocab" if tied else "tokens", "embed")
        weight = (std * jax.random.normal(rngs.params(), (num_embeddings, features), jnp.float32)).astype(
            dtype
        )
        if padding_idx is not None:
            weight = weight.at[padding_idx].set(0)
        self.weight: nnx.Param | QuantizedParam = nnx.Param(place(weight, mesh, axes), axes=axes)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the rows of these tokens, in the weight's dtype; of a quantized weight, in float32."""
        if isinstance(self.weight, QuantizedParam):
            return self.weight.gathered(self.mesh).rows(ids)
        weight = gather(self.weight[...], self.mesh, self.weight.axes)
        x = jnp.take(weight, ids, axis=0, mode="clip")
        if self.padding_idx is None:
            return x
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)
