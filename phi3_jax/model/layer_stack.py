"""The layers of a decoder one after another: a list for inference, a scanned stack for training."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from phi3_jax.cache.cache import KVCache, Vectors
from phi3_jax.errors import UserError
from phi3_jax.model.decoder_layer import Phi3DecoderLayer
from phi3_jax.model.masks import CausalMask

Model = TypeVar("Model", bound=Any)
Policy = Callable[..., bool]
Run = tuple[list[Array], list[Array], list[tuple[Vectors, Vectors]]]
"""Each layer's output (of a stack only the last one's), attention weights, keys and values."""


class StackedLayers(nnx.Module):
    """All layers as one whose parameters have a leading axis, the layers.

    A scan compiles its body once, which is what training needs; it copies what lies in a cache, so that
    inference runs on a list.
    """

    def __init__(self, layers: list[Phi3DecoderLayer]):
        self.count = len(layers)
        self.layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def unstack(self) -> list[Phi3DecoderLayer]:
        return [jax.tree.map(itemgetter(index), self.layer) for index in range(self.count)]

    def __len__(self) -> int:
        return self.count


def run_layers(
    layers: nnx.List[Phi3DecoderLayer] | StackedLayers,
    x: Array,
    tables: tuple[Array, Array],
    mask: CausalMask | Array,
    cache: KVCache | None,
    *,
    keep: int,
    output_attentions: bool,
    key: Array | None,
    remat_policy: Policy | None,
) -> Run:
    """Runs `x` through all layers, the last of them at the last `keep` positions only (0: at all)."""
    run: Callable[..., Any] = _run_layer
    if remat_policy is not None:
        run = jax.checkpoint(run, policy=remat_policy, static_argnums=(5, 6))
    if isinstance(layers, StackedLayers):
        if cache is not None or output_attentions:
            raise UserError(
                "stacked layers are for training: no cache, no attentions; unstack the model first"
            )
        return [_scan(layers, run, x, tables, mask, key)], [], []
    fresh = isinstance(mask, CausalMask) and mask.fresh
    hidden_states, attentions, present = [], [], []
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        past = None if cache is None else cache.layer(index, fresh)
        x, weights, pair = run(
            layer, x, tables, mask, past, keep if last else 0, output_attentions, _layer_key(key, index)
        )
        hidden_states.append(x)
        if output_attentions:
            attentions.append(weights)
        present.append(pair)
    return hidden_states, attentions, present


def _scan(
    layers: StackedLayers,
    run: Callable[..., Any],
    x: Array,
    tables: tuple[Array, Array],
    mask: CausalMask | Array,
    key: Array | None,
) -> Array:
    def body(x: Array, item: tuple[Array, Phi3DecoderLayer]) -> tuple[Array, None]:
        index, layer = item
        return run(layer, x, tables, mask, None, 0, False, _layer_key(key, index))[0], None

    return jax.lax.scan(body, x, (jnp.arange(layers.count), layers.layer))[0]


def _layer_key(key: Array | None, index: Array | int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, index + 1)


@partial(jax.jit, static_argnums=(5, 6))
def _run_layer(
    layer: Phi3DecoderLayer,
    x: Array,
    tables: tuple[Array, Array],
    mask: CausalMask | Array,
    past: Any,
    keep: int,
    output_attentions: bool,
    key: Array | None,
) -> tuple[Array, Array | None, tuple[Vectors, Vectors] | None]:
    """One layer, as a function that JAX traces once for all layers; XLA inlines it again."""
    return layer(x, tables, mask, past, keep, output_attentions, key)


def stack_layers(model: Model) -> Model:
    """The same model with its layers stacked, for training; the given one stays as it is."""
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model.decoder.layers, StackedLayers):
        return model
    model.decoder.layers = StackedLayers(list(model.decoder.layers))
    return model


def unstack_layers(model: Model) -> Model:
    """The same model with its layers in a list again."""
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model.decoder.layers, StackedLayers):
        model.decoder.layers = nnx.List(model.decoder.layers.unstack())
    return model
