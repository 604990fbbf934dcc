"""Low-rank adapters (LoRA, Hu et al. 2021) on the projections of a model."""

import math
from collections.abc import Collection, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from phi3_jax.errors import UserError
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.layers import Linear, dropout
from phi3_jax.parallel.sharding import gather, place

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The projections of a layer."""

Model = TypeVar("Model", bound=Phi3PreTrainedModel)


class LoRA(nnx.Module):
    """An adapter of a projection, which adds `scaling * B(A(x))`; B starts at zero.

    `a` is `[rank, *inputs]` and `b` is `[*outputs, rank]`, both float32 and sharded like the projection.
    """

    def __init__(
        self, base: Linear, *, rank: int, alpha: float, rslora: bool, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        self.mesh, self.rank, self.alpha, self.rslora = base.mesh, rank, alpha, rslora
        self.dropout = dropout
        """The rate of dropout on the adapter's input, where there is a key."""
        shape, axes, split = base.weight.shape, base.weight.axes, len(base.weight.axes) - base.input_axes
        a_axes, b_axes = ("rank", *axes[split:]), (*axes[:split], "rank")
        bound = math.prod(shape[split:]) ** -0.5
        a = jax.random.uniform(rngs.params(), (rank, *shape[split:]), jnp.float32, -bound, bound)
        b = jnp.zeros((*shape[:split], rank), jnp.float32)
        self.a = nnx.LoRAParam(place(a, base.mesh, a_axes), axes=a_axes)
        self.b = nnx.LoRAParam(place(b, base.mesh, b_axes), axes=b_axes)

    @property
    def scaling(self) -> float:
        """alpha / rank; if rank-stabilised (Kalajdzievski 2023), alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __call__(self, x: Float[Array, "..."], key: Key[Array, ""] | None = None) -> Float[Array, "..."]:
        """Maps [..., *inputs] to [..., *outputs] in float32; `key` turns dropout on."""
        x = dropout(x, self.dropout, key)
        a = gather(self.a[...], self.mesh, self.a.axes).astype(x.dtype)
        b = gather(self.b[...], self.mesh, self.b.axes).astype(x.dtype)
        lead = x.ndim - a.ndim + 1
        inputs = tuple(range(lead, x.ndim)), tuple(range(1, a.ndim))
        low = jax.lax.dot_general(x, a, (inputs, ((), ())), preferred_element_type=jnp.float32)
        low = low.astype(x.dtype)
        rank = (lead,), (b.ndim - 1,)
        return self.scaling * jax.lax.dot_general(
            low, b, (rank, ((), ())), preferred_element_type=jnp.float32
        )

    def weight(self) -> Float[Array, "..."]:
        """Returns the adapter as one weight `[*outputs, *inputs]`, float32."""
        a, b = self.a[...], self.b[...]
        return self.scaling * jax.lax.dot_general(b, a, (((b.ndim - 1,), (0,)), ((), ())))


def add_lora(
    model: Model,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Collection[str] = TARGETS,
    rslora: bool = False,
    lora_dropout: float = 0.0,
    rngs: nnx.Rngs | int = 0,
) -> Model:
    """Returns a model with adapters of this rank on the named projections of every layer.

    Their parameters are `nnx.LoRAParam`s, so that `Trainer(wrt=nnx.LoRAParam)` trains only them. The given
    model does not change, and both share their weights.

    Args:
        model: the base model, with a list of layers.
        rank: of every adapter.
        alpha: scales the adapters by alpha / rank; default: twice the rank.
        targets: the projections that get adapters.
        rslora: scale by alpha / sqrt(rank) instead.
        lora_dropout: the rate of dropout on the adapters' inputs, where the model gets `rngs`.
        rngs: for the initial A; an int is a seed.

    Raises:
        UserError: the rank is below 1, the rate is outside [0, 1), a target is unknown, or the model's layers
            are stacked or already have adapters.
    """
    if rank < 1:
        raise UserError(f"rank={rank} must be at least 1")
    if not 0 <= lora_dropout < 1:
        raise UserError(f"lora_dropout={lora_dropout} must be at least 0 and below 1")
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise UserError(f"there is no projection {', '.join(unknown)}; use {', '.join(TARGETS)}")
    alpha = 2.0 * rank if alpha is None else alpha
    rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, linear in projections(model):
        if linear.adapter is not None:
            raise UserError("the model already has adapters; merge them first (merge_lora)")
        if name.rpartition(".")[2] in targets:
            linear.adapter = LoRA(
                linear, rank=rank, alpha=alpha, rslora=rslora, dropout=lora_dropout, rngs=rngs
            )
    return model


def merge_lora(model: Model) -> Model:
    """Returns a model without adapters that computes the same, except for rounding."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for _, linear in projections(model):
        if linear.adapter is not None:
            weight = linear.weight[...]
            linear.weight.set_value(
                (weight.astype(jnp.float32) + linear.adapter.weight()).astype(weight.dtype)
            )
            linear.adapter = None
    return model


def projections(model: Phi3PreTrainedModel) -> Iterator[tuple[str, Linear]]:
    """Yields the projections of all layers, with their names in a checkpoint.

    Raises:
        UserError: the layers are stacked.
    """
    if not isinstance(model.decoder.layers, nnx.List):
        raise UserError("the model's layers are stacked; unstack them first (unstack_layers)")
    prefix = "" if model.decoder is model else "model."
    for index, layer in enumerate(model.decoder.layers):
        for name in TARGETS:
            block = "self_attn" if hasattr(layer.self_attn, name) else "mlp"
            yield f"{prefix}layers.{index}.{block}.{name}", getattr(getattr(layer, block), name)
