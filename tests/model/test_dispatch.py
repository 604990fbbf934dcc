"""Tests which attention kernel is chosen for a TPU, for CUDA and for other platforms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import with_blocks

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.kernels.dispatch import choose_kernels
from phi3_jax.model.masks import CausalMask

PREFILLS: list[tuple[int, dict[str, Any], str]] = [
    (255, {}, "xla xla xla"),
    (256, {}, "splash cudnn xla"),
    (256, {"dtype": jnp.float32}, "splash xla xla"),
    (256, {"width": 160}, "splash xla xla"),
    (256, {"window": 255}, "splash xla xla"),
    (256, {"window": 256}, "splash cudnn xla"),
    (256, {"segments": True}, "splash xla xla"),
    (256, {"platform": "tpu"}, "splash xla xla"),
    (256, {"platform": "gpu"}, "splash cudnn xla"),
    (256, {"platform": "gpu", "context": 2}, "splash xla xla"),  # cuDNN needs all queries of a prefill
    (256, {"platform": "cpu"}, "splash xla xla"),
    (256, {"platform": "tpu", "context": 2}, "splash xla xla"),
    (384, {"platform": "tpu", "context": 1}, "splash xla xla"),
    (384, {"platform": "tpu", "context": 2}, "xla xla xla"),  # the parts are not whole tiles
    (256, {"implementation": "xla"}, "xla xla xla"),
    (8, {"implementation": "pallas"}, "splash splash splash"),
    (8, {"implementation": "pallas", "window": 4, "segments": True}, "splash splash splash"),
    (256, {"implementation": "pallas", "platform": "cpu", "context": 2}, "splash splash splash"),
    (384, {"implementation": "pallas", "platform": "cpu", "context": 2}, "xla xla xla"),
    (127, {"block": 64}, "xla xla xla"),
    (128, {"block": 64}, "striped striped striped"),  # twice the tokens that a query sees at least
    (255, {"block": 64}, "striped striped striped"),
    (256, {"block": 64}, "splash striped striped"),
    (256, {"block": 64, "implementation": "xla"}, "xla xla xla"),
    (256, {"block": 48}, "striped striped striped"),  # no power of two
    (256, {"block": 64, "segments": True}, "xla xla xla"),  # blocks start anew in each segment
    (256, {"block": 64, "window": 255}, "xla xla xla"),
    (256, {"block": 64, "platform": "tpu", "context": 2}, "splash xla xla"),
    (8, {"block": 4, "implementation": "pallas"}, "splash splash splash"),
    (8, {"block": 3, "implementation": "pallas"}, "xla xla xla"),
    (256, {"block": 64, "implementation": "cudnn"}, "striped striped striped"),
    (8, {"implementation": "cudnn"}, "xla cudnn xla"),
    (256, {"implementation": "cudnn"}, "xla cudnn xla"),
    (8, {"implementation": "cudnn", "window": 4}, "xla cudnn xla"),
    (8, {"implementation": "cudnn", "segments": True}, "xla cudnn xla"),
    (8, {"implementation": "cudnn", "dtype": jnp.float32}, "xla xla xla"),
    (8, {"implementation": "cudnn", "platform": "gpu"}, "xla cudnn xla"),
    (8, {"implementation": "cudnn", "platform": "tpu"}, "xla xla xla"),
]
"""Lengths, options, and the kernels for a TPU, for CUDA and for others."""

CACHES: list[tuple[int, int, dict[str, Any], str]] = [
    (1, 511, {}, "xla xla xla"),
    (1, 512, {}, "cached xla xla"),
    (2, 511, {}, "xla xla xla"),
    (2, 512, {}, "cached cudnn xla"),
    (31, 512, {}, "cached cudnn xla"),
    (32, 511, {}, "blockwise blockwise blockwise"),
    (32, 512, {}, "cached cudnn blockwise"),
    (2, 512, {"window": 1}, "cached cudnn xla"),
    (2, 512, {"segments": True}, "xla xla xla"),
    (2, 512, {"dtype": jnp.float32}, "cached xla xla"),
    (2, 512, {"platform": "cpu"}, "cached xla xla"),
    (2, 512, {"platform": "gpu", "context": 2}, "cached xla xla"),
    (32, 512, {"int8": True}, "cached xla xla"),
    (32, 512, {"implementation": "xla"}, "xla xla xla"),
    (1, 8, {"implementation": "pallas"}, "cached cached cached"),
    (1, 8, {"implementation": "pallas", "int8": True}, "cached cached cached"),
    (32, 512, {"implementation": "pallas", "segments": True}, "xla xla xla"),
    (1, 511, {"block": 3}, "xla xla xla"),
    (1, 512, {"block": 3}, "cached xla xla"),
    (32, 512, {"block": 3, "int8": True}, "cached xla xla"),
    (32, 512, {"block": 3, "segments": True}, "xla xla xla"),
    (1, 8, {"block": 3, "implementation": "pallas"}, "cached cached cached"),
    (1, 8, {"implementation": "cudnn"}, "xla cudnn xla"),
    (32, 512, {"implementation": "cudnn"}, "xla cudnn xla"),
    (2, 512, {"implementation": "cudnn", "int8": True}, "xla xla xla"),
    (2, 512, {"implementation": "cudnn", "context": 2}, "xla xla xla"),
]
"""Lengths, slots, options, and the kernels."""


def chosen_kernels(
    length: int,
    slots: int | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    width: int = 64,
    window: int | None = None,
    segments: bool = False,
    int8: bool = False,
    block: int | None = None,
    implementation: str | None = None,
    **options: Any,
) -> str:
    """Returns the kernels of a prefill, or of `length` queries in the last of a cache's `slots`."""
    size = slots or length
    key: Any = QuantizedVectors.zeros((1, 1, size, width)) if int8 else jnp.zeros((1, 1, size, width), dtype)
    key_slots = np.arange(size)[None]
    numbers = np.ones_like(key_slots) if segments else None
    mask = CausalMask(key_slots, key_slots, key_slots >= 0, window, True, numbers, numbers)
    if block is not None:
        mask = with_blocks(mask, BlockPattern(block, local=1, stride=2, heads=1), 1)
    if slots is not None:
        mask = mask.last_queries(length)
    query = jnp.zeros((1, length, 1, 1, width), dtype)
    kernels = choose_kernels(query, key, mask, implementation, **options)
    return " ".join(kernels[platform] for platform in ("tpu", "cuda", "default"))


@pytest.mark.usefixtures("cudnn_is_installed")
@pytest.mark.parametrize(("length", "options", "expected"), PREFILLS)
def test_chooses_kernels_for_a_prefill(length: int, options: dict[str, Any], expected: str) -> None:
    assert chosen_kernels(length, **options) == expected


@pytest.mark.usefixtures("cudnn_is_installed")
@pytest.mark.parametrize(("length", "slots", "options", "expected"), CACHES)
def test_chooses_kernels_for_a_cache(length: int, slots: int, options: dict[str, Any], expected: str) -> None:
    assert chosen_kernels(length, slots, **options) == expected


def test_chooses_no_pallas_kernel_for_a_tpu_with_64_bit_numbers() -> None:
    """JAX cannot lower one then."""
    with jax.enable_x64(True):
        assert chosen_kernels(256, dtype=jnp.float32) == "xla xla xla"
        assert chosen_kernels(1, 512, dtype=jnp.float32) == "xla xla xla"
