"""Low-rank adapters (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024) on the projections of a model."""

import math
from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.layers import Linear, QuantizedParam, across, dropout
from phi3_jax.parallel.sharding import gather, place

TARGETS = tuple(Phi3Config.projections)
"""The projections of a layer, by Phi-3's names."""

Model = TypeVar("Model", bound=Phi3PreTrainedModel)


class LoRA(nnx.Module):
    """An adapter of a projection, which adds `scaling * B(A(x))`; B starts at zero.

    `a` is `[rank, *inputs]` and `b` is `[*outputs, rank]`, both float32 and sharded like the projection. With
    `dora`, each row of the adapted weight, `W + scaling * B A`, is scaled to the length that `magnitude`
    `[*outputs]` has for it (Liu et al. 2024, equation 5). `add_lora` starts it with the lengths of W's rows.
    """

    def __init__(
        self,
        base: Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool,
        dropout: float = 0.0,
        dora: bool = False,
        rngs: nnx.Rngs,
    ):
        self.mesh, self.rank, self.alpha, self.rslora = base.mesh, rank, alpha, rslora
        self.dropout = dropout
        """The rate of dropout on the adapter's input, where there is a key."""
        shape, axes, split = base.shape, base.axes, len(base.axes) - base.input_axes
        a_axes, b_axes = ("rank", *axes[split:]), (*axes[:split], "rank")
        bound = math.prod(shape[split:]) ** -0.5
        a = jax.random.uniform(rngs.params(), (rank, *shape[split:]), jnp.float32, -bound, bound)
        b = jnp.zeros((*shape[:split], rank), jnp.float32)
        self.a = nnx.LoRAParam(place(a, base.mesh, a_axes), axes=a_axes)
        self.b = nnx.LoRAParam(place(b, base.mesh, b_axes), axes=b_axes)
        self.magnitude: Any = nnx.data(None)
        if dora:
            ones = place(jnp.ones(shape[:split], jnp.float32), base.mesh, axes[:split])
            # 16 bits would change every row by up to 0.4 %.
            self.magnitude = nnx.LoRAParam(ones, axes=axes[:split], keeps_dtype=True)

    @property
    def scaling(self) -> float:
        """alpha / rank; if rank-stabilised (Kalajdzievski 2023), alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __call__(
        self,
        x: Float[Array, "..."],
        y: Float[Array, "..."],
        base: Linear,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Returns the output of the adapted projection, without a bias, in float32.

        Args:
            x: the projection's input, [..., *inputs].
            y: its product with the weight, [..., *outputs].
            base: the projection.
            key: turns dropout on. As in PEFT, with `dora` only what changes the product sees it.
        """
        dropped = dropout(x, self.dropout, key)
        y, added = y.astype(jnp.float32), self._product(dropped)
        if self.magnitude is None:
            return y + added
        scale = across(self._row_scale(base.weight[...]), y.ndim)
        if dropped is x:
            return scale * (y + added)
        return y + (scale - 1) * base.product(dropped).astype(jnp.float32) + scale * added

    def _product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps [..., *inputs] to [..., *outputs] in float32."""
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

    def _row_scale(self, weight: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the factor of each row of the adapted weight, [*outputs], whole along `fsdp`.

        The rows' lengths are constants for gradients (section 4.3). They are computed without the adapted
        weight, which would take as much memory as the projection's:
        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b A A' b'.
        """
        w, a, b = map(jax.lax.stop_gradient, (weight, self.a[...], self.b[...]))
        inputs = tuple(range(b.ndim - 1, w.ndim)), tuple(range(1, a.ndim))
        full: Any = {"preferred_element_type": jnp.float32}
        of_w = jax.lax.dot_general(w, a.astype(w.dtype), (inputs, ((), ())), **full)  # [*outputs, rank]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        of_a = jax.lax.dot_general(a, a, ((inputs[1], inputs[1]), ((), ())), **full)  # [rank, rank]
        of_b = jax.lax.dot_general(b, of_a, (((b.ndim - 1,), (0,)), ((), ())), **full)  # [*outputs, rank]
        changes = jnp.sum(b * (2 * of_w + self.scaling * of_b), axis=-1)
        squares = jnp.square(row_lengths(w, b.ndim - 1)) + self.scaling * changes
        ratio = _ratio(self.magnitude[...], jnp.sqrt(jnp.maximum(squares, 0)))
        return gather(ratio, self.mesh, self.magnitude.axes)

    def weight(self) -> Float[Array, "..."]:
        """Returns the low-rank part as one weight `[*outputs, *inputs]`, float32."""
        a, b = self.a[...], self.b[...]
        return self.scaling * jax.lax.dot_general(b, a, (((b.ndim - 1,), (0,)), ((), ())))

    def merged(self, weight: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the weight with which a projection computes the same without the adapter."""
        total = weight.astype(jnp.float32) + self.weight()
        if self.magnitude is not None:
            scale = _ratio(self.magnitude[...], row_lengths(total, self.b.ndim - 1))
            total = total * jnp.expand_dims(scale, range(scale.ndim, total.ndim))
        return total.astype(weight.dtype)


def row_lengths(weight: Float[Array, "..."], outputs: int) -> Float[Array, "..."]:
    """Returns the Euclidean lengths of a weight's rows, float32, whose first `outputs` axes are the rows."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=tuple(range(outputs, weight.ndim))))


def _ratio(magnitude: Float[Array, "..."], length: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the factors that give rows of this length the magnitude; 0 for rows of zeros."""
    return jnp.where(length > 0, magnitude / jnp.where(length > 0, length, 1), 0)


def add_lora(
    model: Model,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Collection[str] = TARGETS,
    rslora: bool = False,
    lora_dropout: float = 0.0,
    dora: bool = False,
    rngs: nnx.Rngs | int = 0,
) -> Model:
    """Returns a model with adapters of this rank on the named projections of every layer.

    Their parameters are `nnx.LoRAParam`s, so that `Trainer(wrt=nnx.LoRAParam)` trains only them. The given
    model does not change, and both share their weights.

    Args:
        model: the base model, with a list of layers.
        rank: of every adapter.
        alpha: scales the adapters by alpha / rank; default: twice the rank.
        targets: the projections that get adapters, by Phi-3's names or by the model's own.
        rslora: scale by alpha / sqrt(rank) instead.
        dora: learn the lengths of the adapted weights' rows apart from their directions (DoRA).
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
    names = own_names(model.config)
    if unknown := sorted(set(targets) - names.keys() - set(names.values())):
        raise UserError(f"there is no projection {', '.join(unknown)}; use {', '.join(names.values())}")
    targets = {names.get(target, target) for target in targets}
    alpha = 2.0 * rank if alpha is None else alpha
    rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, linear in projections(model):
        if linear.adapter is not None:
            raise UserError("the model already has adapters; merge them first (merge_lora)")
        if name.rpartition(".")[2] in targets:
            options: Any = {"rslora": rslora, "dropout": lora_dropout, "dora": dora}
            linear.adapter = LoRA(linear, rank=rank, alpha=alpha, **options, rngs=rngs)
            if dora:
                check_floats(name, linear)
                magnitude = linear.adapter.magnitude
                lengths = row_lengths(linear.weight[...], magnitude.ndim)
                magnitude.set_value(place(lengths, linear.mesh, magnitude.axes))
    return model


def check_floats(name: str, linear: Linear) -> None:
    """Raises UserError unless DoRA can adapt this projection."""
    if isinstance(linear.weight, QuantizedParam):
        raise UserError(f'{name} is quantized, and DoRA needs its floats (quantization="none")')


def merge_lora(model: Model) -> Model:
    """Returns a model without adapters that computes the same, except for rounding.

    Raises:
        UserError: an adapted weight is quantized.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, linear in projections(model):
        if linear.adapter is not None:
            if isinstance(linear.weight, QuantizedParam):
                raise UserError(
                    f"{name} is quantized, so its adapter cannot be merged into it; load the model with "
                    'quantization="none", merge, and quantize it again'
                )
            weight = linear.adapter.merged(linear.weight[...])
            linear.weight.set_value(place(weight, linear.mesh, linear.weight.axes))
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
        for path in model.config.projections.values():
            yield f"{prefix}layers.{index}.{path}", attrgetter(path)(layer)


def own_names(config: Phi3Config) -> dict[str, str]:
    """Returns the names of a layer's projections, by Phi-3's."""
    return {name: path.rpartition(".")[2] for name, path in config.projections.items()}
