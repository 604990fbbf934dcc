"""Computes how many tokens' keys and values fit into memory."""

import math

import jax

from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.parallel.sharding import shards

SHARE = 0.75
"""The share of an accelerator's free memory for keys and values; activations need the rest."""

SHARE_OF_HOST = 0.4
"""The share of the host's memory, which other programs use as well."""


def token_bytes(compiled: CompiledModel) -> int:
    """Returns the bytes of one token's keys and values in all layers, on all devices together."""
    rows, slots = shards(compiled.mesh, "batch"), shards(compiled.mesh, "slots")  # the smallest cache
    dtype = compiled.model.cache_dtype
    cache = jax.eval_shape(lambda: compiled.model.init_cache(rows, slots, dtype))
    vectors = jax.tree.leaves((cache.keys, cache.values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in vectors) // (rows * slots)


def token_capacity(compiled: CompiledModel) -> int:
    """Returns how many tokens memory has room for now; next to the parameters if the model is abstract."""
    devices = [jax.devices()[0]] if compiled.mesh is None else list(compiled.mesh.devices.flat)
    free, model = min(_free(device) for device in devices), _abstract_bytes(compiled.model)
    if devices[0].platform == "cpu":  # all devices share the same memory
        room = SHARE_OF_HOST * (free - model * len(devices))
    else:
        room = SHARE * (free - model) * len(devices)
    return max(0, int(room)) // token_bytes(compiled)


def _abstract_bytes(model: CausalLM) -> int:
    """Returns the bytes on each device of the parameters that are not loaded yet."""
    return sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape))
        * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(model)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def _free(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    import psutil

    return psutil.virtual_memory().available
