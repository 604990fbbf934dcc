"""How many tokens' keys and values there is memory for."""

import math

import jax

from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.parallel.sharding import shards

SHARE = 0.75
"""Of an accelerator's free memory; the rest is for what is computed on the way."""

SHARE_OF_HOST = 0.4
"""Of memory that other programs want, too."""


def token_bytes(compiled: CompiledModel) -> int:
    """Of the keys and values of one token, in all layers and on all devices together."""
    rows, columns = shards(compiled.mesh, "batch"), shards(compiled.mesh, "slots")  # no cache is smaller
    dtype = compiled.model.cache_dtype
    cache = jax.eval_shape(lambda: compiled.model.init_cache(rows, columns, dtype))
    vectors = jax.tree.leaves((cache.keys, cache.values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in vectors) // (rows * columns)


def token_capacity(compiled: CompiledModel) -> int:
    """Columns, of all slots together, that memory now has room for; with an abstract model, beside it."""
    devices = [jax.devices()[0]] if compiled.mesh is None else list(compiled.mesh.devices.flat)
    free, model = min(_free(device) for device in devices), _bytes_to_come(compiled.model)
    if devices[0].platform == "cpu":  # all of them in the same memory
        room = SHARE_OF_HOST * (free - model * len(devices))
    else:
        room = SHARE * (free - model) * len(devices)
    return max(0, int(room)) // token_bytes(compiled)


def _bytes_to_come(model: CausalLM) -> int:
    """On each device, of parameters that are not there yet."""
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
