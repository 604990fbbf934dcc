"""The loss of a language model's head in blocks of positions, so that the logits of all are never in memory.

A block has logits, loss and gradients at once. Nothing is computed again in the backward pass, which only
multiplies by the gradient of the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.parallel.sharding import axis_names, gathered_axes, shards, spec
from phi3_jax.quantization.weight import QuantizedWeight
from phi3_jax.sizes import ceil_div, round_up

WHOLE_BYTES = 2**29
"""The most bytes of float32 logits on one device that are computed whole. The loss holds them about twice."""

BLOCK_BYTES = 2**27
"""The bytes of a block's logits, where they allow as many positions as follow."""

LEAST_POSITIONS = 512
"""The fewest positions of a block, which reads the whole weight. With fewer, chips wait for their memory: TPU
v5e does 240 operations in the time that it reads a byte."""

LEAST_TRAINED_POSITIONS = 1024
"""The same where a block also reads and writes the weight's gradient, which is float32."""

Product = Callable[[Array, Any], Array]
Finish = Callable[..., Array]
"""Changes logits one by one; the second argument, default 0, is the id of the first of them."""


def no_change(logits: Array, first: Any = 0) -> Array:
    """Returns the logits as they are."""
    return logits


"""Maps hidden states [positions, D] and a weight [V, D] to float32 logits [positions, V]."""


def needs_blocks(positions: int, vocabulary: int) -> bool:
    """Whether the logits of all positions of a device, for its part of the vocabulary, are too large."""
    return 4 * positions * vocabulary > WHOLE_BYTES


def block_positions(positions: int, vocabulary: int, *, trained: bool) -> int:
    """Returns the positions of a block, of equal size but for rounding.

    Args:
        positions: of the device.
        vocabulary: the tokens in the device's part of the vocabulary.
        trained: whether the weight has a gradient.
    """
    least = LEAST_TRAINED_POSITIONS if trained else LEAST_POSITIONS
    count = ceil_div(positions, max(least, BLOCK_BYTES // (4 * vocabulary)))
    return positions if count == 1 else round_up(ceil_div(positions, count), 8)


@dataclass(frozen=True)
class BlockedHead:
    """A head without its numbers."""

    product: Product
    finish: Finish
    axes: tuple[str, ...]
    """The logical axes of the weight [V, D]."""
    vocabulary: int
    label_smoothing: float
    mesh: Mesh | None


class _Sums(NamedTuple):
    """The sum of the losses and its gradients, those that are needed."""

    loss: Float[Array, ""]
    x: Float[Array, "B T D"] | None
    weight: Float[Array, "V D"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_cross_entropy_sum(
    head: BlockedHead, x: Float[Array, "B T D"], weight: Any, labels: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the sum of the cross entropies of labels that are not -100; labels are not shifted.

    It has gradients for `x` and, if it is an array of floats, for `weight`, which are summed in float32.
    `fsdp`, `data` and `context` divide the positions and `tensor` the vocabulary. The weight's gradient is
    summed over the devices once.

    Args:
        head: the product and its axes.
        x: the decoder's hidden states.
        weight: [V, D], an array or a quantized weight; no longer divided by `fsdp`.
        labels: the token that each position predicts.
    """
    return _sums(head, x, weight, labels, (False, False)).loss


def _forward(head: BlockedHead, x: Any, weight: Any, labels: Any) -> tuple[Array, Any]:
    """Computes the loss and the gradients of those arguments that are differentiated."""
    perturbed = x.perturbed, any(leaf.perturbed for leaf in _primals(weight))
    x, weight, labels = jax.tree.map(lambda leaf: leaf.value, (x, weight, labels), is_leaf=_is_primal)
    sums = _sums(head, x, weight, labels, perturbed)
    like = jnp.zeros((0,), weight.dtype) if perturbed[1] else None
    return sums.loss, (sums.x, sums.weight, like)


def _backward(head: BlockedHead, saved: Any, gradient: Array) -> tuple[Array | None, Any, None]:
    of_x, of_weight, like = saved
    if of_x is not None:
        of_x = (gradient * of_x.astype(jnp.float32)).astype(of_x.dtype)
    if of_weight is not None:
        of_weight = (gradient * of_weight).astype(like.dtype)
    return of_x, of_weight, None


blocked_cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _primals(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_primal)


def _sums(head: BlockedHead, x: Array, weight: Any, labels: Array, wanted: tuple[bool, bool]) -> _Sums:
    """Computes the sums on one device or on every device of a mesh; `wanted` are the gradients."""
    local = partial(_local_sums, head, wanted)
    if head.mesh is None:
        return local(x, weight, labels)
    positions = spec("batch", "length", None)
    axes = weight.leaf_axes(head.axes) if isinstance(weight, QuantizedWeight) else head.axes
    weights = jax.tree.map(
        lambda axes: spec(*gathered_axes(axes)), axes, is_leaf=lambda node: isinstance(node, tuple)
    )
    sums: Any = spec(), positions if wanted[0] else None, spec(*head.axes) if wanted[1] else None
    return jax.shard_map(
        local,
        mesh=head.mesh,
        in_specs=(positions, weights, spec("batch", "length")),
        out_specs=_Sums(*sums),
        check_vma=False,  # sums over blocks start as zeros, which are the same on all devices
    )(x, weight, labels)


def _local_sums(head: BlockedHead, wanted: tuple[bool, bool], x: Array, weight: Any, labels: Array) -> _Sums:
    """Computes the sums of one device's positions and tokens, then adds up those of all devices."""
    shape, size = x.shape, x.shape[-1]
    x, labels = x.reshape(-1, size), labels.reshape(-1)
    vocabulary = head.vocabulary // shards(head.mesh, "vocab")
    block = block_positions(len(x), vocabulary, trained=wanted[1])
    missing = -len(x) % block
    x = jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, block, size)
    labels = jnp.pad(labels, (0, missing), constant_values=IGNORE_INDEX).reshape(-1, block)

    def add(total: _Sums, item: tuple[Array, Array]) -> tuple[_Sums, Array | None]:
        own = _block_sums(head, wanted, item[0], weight, item[1])
        return _Sums(total.loss + own.loss, None, jax.tree.map(jnp.add, total.weight, own.weight)), own.x

    zeros = jnp.zeros((vocabulary, size), jnp.float32) if wanted[1] else None
    (loss, _, of_weight), of_x = jax.lax.scan(
        add, _Sums(jnp.zeros((), jnp.float32), None, zeros), (x, labels)
    )
    over = (*axis_names(head.mesh, "batch"), *axis_names(head.mesh, "length"))
    if of_x is not None:
        of_x = of_x.reshape(-1, size)[: len(of_x) * block - missing].reshape(shape)
        of_x = _add_up(of_x, axis_names(head.mesh, "vocab"))
    if of_weight is not None:
        scattered = axis_names(head.mesh, "embed")
        if scattered and shards(head.mesh, "embed") > 1:
            of_weight = _scatter_columns(of_weight, scattered, shards(head.mesh, "embed"))
        of_weight = _add_up(of_weight, tuple(name for name in over if name not in scattered))
    return _Sums(_add_up(loss, over), of_x, of_weight)


def _block_sums(head: BlockedHead, wanted: tuple[bool, bool], x: Array, weight: Any, labels: Array) -> _Sums:
    """Returns the sums of a block of positions [P, D]; the gradients are those of this device's tokens."""
    products, pull = jax.vjp(lambda x: head.product(x, weight), x)  # [P, V]
    names, smoothing, counted = axis_names(head.mesh, "vocab"), head.label_smoothing, labels != IGNORE_INDEX
    first = sum((jax.lax.axis_index(name) * products.shape[1] for name in names), jnp.int32(0))
    logits, pull_finish = jax.vjp(lambda products: head.finish(products, first), products)
    is_label = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == (labels - first)[:, None]
    largest = jax.lax.pmax(jnp.max(logits, axis=-1), tuple(names)) if names else jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - largest[:, None])
    total = _add_up(jnp.sum(powers, axis=-1), names)
    losses = largest + jnp.log(total)
    losses = losses - (1 - smoothing) * _add_up(jnp.sum(jnp.where(is_label, logits, 0), axis=-1), names)
    if smoothing:
        losses = losses - smoothing / head.vocabulary * _add_up(jnp.sum(logits, axis=-1), names)
    loss = jnp.sum(jnp.where(counted, losses, 0))
    if not any(wanted):
        return _Sums(loss, None, None)
    gradient = powers / total[:, None] - smoothing / head.vocabulary
    gradient = jnp.where(counted[:, None], jnp.where(is_label, gradient - (1 - smoothing), gradient), 0)
    (gradient,) = pull_finish(gradient)
    of_weight = None
    if wanted[1]:
        of_weight = jax.lax.dot_general(
            gradient.astype(x.dtype), x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
    return _Sums(loss, pull(gradient)[0] if wanted[0] else None, of_weight)


def _scatter_columns(x: Float[Array, "V D"], names: tuple[str, ...], pieces: int) -> Float[Array, "V part"]:
    """Returns this device's columns of the sum over the devices along these mesh axes.

    It sums a block of rows at a time: for a TPU, XLA makes of a reduce-scatter a sum that is whole on every
    device, and a slice of it.
    """
    height, width = x.shape
    count = ceil_div(4 * height * width, BLOCK_BYTES)
    rows = ceil_div(height, count)

    def add(number: Array, total: Array) -> Array:
        start = jnp.minimum(number * rows, height - rows)  # the last block may overlap the one before it
        part = jax.lax.dynamic_slice_in_dim(x, start, rows)
        part = jax.lax.psum_scatter(part, names, scatter_dimension=1, tiled=True)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)

    zeros = jnp.zeros((height, width // pieces), x.dtype)
    return jax.lax.fori_loop(0, ceil_div(height, rows), add, zeros)


def _add_up(x: Array, names: Any) -> Array:
    """Returns the sum over the devices along these mesh axes."""
    return jax.lax.psum(x, tuple(names)) if names else x
