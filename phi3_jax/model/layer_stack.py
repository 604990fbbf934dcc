"""Runs the layers of a decoder: a list for inference, a scanned stack for training."""

from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from phi3_jax.cache.cache import KVCache
from phi3_jax.cache.layer_cache import Vectors
from phi3_jax.errors import UserError
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.rope import LayerRope, Tables

Model = TypeVar("Model", bound=Any)
Policy = Callable[..., bool]
LayerOutputs = tuple[list[Array], list[Array], list[tuple[Vectors, Vectors]]]
"""Each layer's output (only the last one's for stacked layers), attention weights, keys and values."""


def can_stack(layers: Iterable[Any]) -> bool:
    """Whether all layers have the same parameters, by name and shape."""
    kinds = {
        tuple((jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(layer))
        for layer in layers
    }
    return len(kinds) == 1


class StackedLayers(nnx.Module):
    """All layers as one, whose parameters have a leading axis of layers.

    A scan compiles its body once, as training needs. It copies the cache, so inference uses a list. Where
    kinds of layers take turns, the body has one layer of each.

    Raises:
        UserError: the parameters of the layers differ, as where only some have adapters.
    """

    def __init__(self, layers: list[Any]):
        if not can_stack(layers):
            raise UserError(
                "the layers differ, such as in their adapters, and cannot be stacked; use a list of layers "
                "(scan_layers=False)"
            )
        self.count = len(layers)
        self.kinds = _period([jax.tree.structure(layer) for layer in layers])
        first = [jax.tree.unflatten(self.kinds[0], jax.tree.leaves(layer)) for layer in layers]
        self.layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *first)

    def unstack(self) -> list[Any]:
        return [
            self.of_kind(index, jax.tree.map(itemgetter(index), self.layer)) for index in range(self.count)
        ]

    def of_kind(self, index: int, layer: Any) -> Any:
        """Returns a layer of the first kind as one of the kind of the layer at `index`."""
        return jax.tree.unflatten(self.kinds[index % len(self.kinds)], jax.tree.leaves(layer))

    def __len__(self) -> int:
        return self.count


def _period(structures: list[Any]) -> tuple[Any, ...]:
    """Returns the shortest run of structures that repeats to make the whole list."""
    count = len(structures)
    lengths = (n for n in range(1, count + 1) if count % n == 0)
    return next(tuple(structures[:n]) for n in lengths if structures == structures[:n] * (count // n))


def run_layers(
    layers: nnx.List[Any] | StackedLayers,
    x: Array,
    rope: Tables | LayerRope,
    mask: CausalMask | Array,
    cache: KVCache | None,
    *,
    keep: int | None,
    output_attentions: bool,
    key: Array | None,
    remat_policy: Policy | None,
) -> LayerOutputs:
    """Runs `x` through all layers; the last one computes its last `keep` positions only (None: all)."""
    run: Callable[..., Any] = _run_layer
    if remat_policy is not None:
        run = jax.checkpoint(run, policy=remat_policy, static_argnums=(5, 6))
    if isinstance(layers, StackedLayers):
        if cache is not None or output_attentions:
            raise UserError(
                "stacked layers are for training: no cache, no attentions; unstack the model first"
            )
        return [_scan(layers, run, x, rope, mask, key)], [], []
    prefill = isinstance(mask, CausalMask) and mask.prefill
    hidden_states, attentions, present = [], [], []
    for index, layer in enumerate(layers):
        past = None if cache is None else cache.layer(index, prefill)
        own_keep = keep if index == len(layers) - 1 else None
        x, weights, vectors = run(
            layer, x, _rope_of(rope, index), mask, past, own_keep, output_attentions, _layer_key(key, index)
        )
        hidden_states.append(x)
        if output_attentions:
            attentions.append(weights)
        present.append(vectors)
    return hidden_states, attentions, present


def _scan(
    layers: StackedLayers,
    run: Callable[..., Any],
    x: Array,
    rope: Tables | LayerRope,
    mask: CausalMask | Array,
    key: Array | None,
) -> Array:
    period = len(layers.kinds)

    def by_period(leaf: Array) -> Array:
        return leaf if period == 1 else leaf.reshape(-1, period, *leaf.shape[1:])

    def part(leaf: Array, offset: int) -> Array:
        # Split, not sliced: gradients are then concatenated rather than padded with zeros and added.
        return leaf if period == 1 else jax.lax.split(leaf, (1,) * period)[offset][0]

    def body(x: Array, item: tuple[Array, Any]) -> tuple[Array, None]:
        numbers, stacked = item
        for offset in range(period):
            layer = layers.of_kind(offset, jax.tree.map(lambda leaf, at=offset: part(leaf, at), stacked))
            index = part(numbers, offset)
            x = run(layer, x, _rope_of(rope, index), mask, None, None, False, _layer_key(key, index))[0]
        return x, None

    numbers = jnp.arange(layers.count, dtype=jnp.int32)
    return jax.lax.scan(body, x, jax.tree.map(by_period, (numbers, layers.layer)))[0]


def _layer_key(key: Array | None, index: Array | int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, index + 1)


def _rope_of(rope: Tables | LayerRope, index: Array | int) -> Tables | tuple[LayerRope, Array | int]:
    """Returns the tables of all layers, or what the layer at `index` computes its own from."""
    return (rope, index) if isinstance(rope, LayerRope) else rope


@partial(jax.jit, static_argnums=(5, 6))
def _run_layer(layer: Callable[..., Any], x: Array, rope: Any, *arguments: Any) -> Any:
    """Runs one layer; under `jit`, JAX traces it once for all layers, and XLA inlines it."""
    tables = rope[0].tables(rope[1]) if isinstance(rope[0], LayerRope) else rope
    return layer(x, tables, *arguments)


def stack_layers(model: Model) -> Model:
    """Returns the model with its layers stacked, for training; the given one is not changed."""
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model.decoder.layers, StackedLayers):
        return model
    model.decoder.layers = StackedLayers(list(model.decoder.layers))
    return model


def unstack_layers(model: Model) -> Model:
    """Returns the model with its layers in a list."""
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model.decoder.layers, StackedLayers):
        model.decoder.layers = nnx.List(model.decoder.layers.unstack())
    return model


def stack_states(tree: Any) -> Any:
    """Returns a tree in which the layers of each `nnx.State` are stacked, as `stack_layers` does it."""

    def stack(layers: nnx.State[Any, Any]) -> dict[Any, Any]:
        own = [layers[index] for index in sorted(layers)]
        return {_STACK: jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)}

    return _with_layers(tree, stack)


def unstack_states(tree: Any) -> Any:
    """Returns a tree in which the layers of each `nnx.State` have numbers; the inverse of `stack_states`."""

    def unstack(layers: nnx.State[Any, Any]) -> dict[Any, Any]:
        stack = layers[_STACK]
        count = len(jax.tree.leaves(stack)[0])
        return {index: jax.tree.map(itemgetter(index), stack) for index in range(count)}

    return _with_layers(tree, unstack)


_STACK = "layer"
"""The name of the one layer of a stack."""


def _with_layers(tree: Any, change: Callable[[nnx.State[Any, Any]], dict[Any, Any]]) -> Any:
    def changed(node: Any) -> Any:
        if not isinstance(node, nnx.State) or "layers" not in node.get("model", {}):
            return node
        return nnx.State({**node, "model": {**node["model"], "layers": change(node["model"]["layers"])}})

    return jax.tree.map(changed, tree, is_leaf=lambda node: isinstance(node, nnx.State))
