"""Computes how many tokens' keys and values fit into memory."""

from collections.abc import Callable

import jax

from phi3_jax.cache.cache import KVCache
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.parallel.sharding import shards
from phi3_jax.sizes import array_bytes

SHARE = 0.75
"""The share of an accelerator's free memory for keys and values; activations need the rest."""

SHARE_OF_HOST = 0.4
"""The share of the host's memory, which other programs use as well."""


LARGE = 1 << 20
"""The tokens of a cache from which `check_cache` looks at memory."""

NewCache = Callable[[int, int], KVCache]
"""Returns an empty cache of so many rows and slots."""


def token_bytes(compiled: CompiledModel) -> int:
    """Returns the bytes of one token's keys and values in all layers, on all devices together."""
    rows, slots = shards(compiled.mesh, "batch"), shards(compiled.mesh, "slots")  # the smallest cache
    dtype = compiled.model.cache_dtype
    cache = jax.eval_shape(lambda: compiled.model.init_cache(rows, slots, dtype))
    vectors = jax.tree.leaves((cache.keys, cache.values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in vectors) // (rows * slots)


def token_capacity(compiled: CompiledModel) -> int:
    """Returns how many tokens memory has room for now; next to the parameters if the model is abstract."""
    free, share = _free_bytes(compiled)
    return max(0, int(share * free)) // token_bytes(compiled)


def check_cache(compiled: CompiledModel, rows: int, tokens: int, new_cache: NewCache) -> None:
    """Checks that a cache for `rows` of `tokens` is not larger than all free memory.

    A cache of few tokens is not looked at, as that takes longer than to allocate it.

    Raises:
        UserError: it is larger; the message has the needed and the free memory.
    """
    if rows * tokens < LARGE:
        return
    cache = jax.eval_shape(lambda: new_cache(rows, tokens))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.keys, cache.values)))
    free, _ = _free_bytes(compiled)
    if needed > free:
        raise UserError(
            f"{rows:,} rows of {tokens:,} tokens need {needed / 2**30:,.2f} GiB for keys and values, and "
            f"{max(0, free) / 2**30:,.2f} GiB are free; choose fewer prompts, beams or returned sequences, "
            "or fewer tokens"
        )


def _free_bytes(compiled: CompiledModel) -> tuple[int, float]:
    """Returns the free bytes of all devices, next to an abstract model, and the share for a cache."""
    devices = [jax.devices()[0]] if compiled.mesh is None else list(compiled.mesh.devices.flat)
    free, model = min(_free(device) for device in devices), _abstract_bytes(compiled.model)
    if devices[0].platform == "cpu":  # all devices share the same memory
        return free - model * len(devices), SHARE_OF_HOST
    return (free - model) * len(devices), SHARE


def _abstract_bytes(model: CausalLM) -> int:
    """Returns the bytes on each device of the parameters that are not loaded yet."""
    return sum(
        array_bytes(
            leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape), leaf.dtype
        )
        for leaf in jax.tree.leaves(model)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def _free(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    import psutil

    return psutil.virtual_memory().available
