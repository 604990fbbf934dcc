"""Tests splash attention over blocks: interpreted against XLA's attention, and compiled for absent TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    SCALE,
    assert_close,
    dense_gradients_and_output,
    gradients_and_output,
    prefill_mask,
    random_arrays,
)
from block_cases import PHI_3_SMALL, with_blocks
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marks import slow

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels import block_splash
from phi3_jax.model.masks import CausalMask

PATTERNS = {
    # Heads 0 to 5 have shifts 0 to 5, modulo 4: the two groups differ, and repeat phases.
    "gqa": BlockPattern(size=16, local=3, stride=4, heads=6),
    # One shift more a head than blocks of the stride; a step of two.
    "step": BlockPattern(size=32, local=2, stride=9, heads=4),
    "same": BlockPattern(size=64, local=1, stride=3, heads=4, same_for_all_heads=True),
    "wide": BlockPattern(size=256, local=1, stride=2, heads=2),
}
GROUPS = {"gqa": 3, "step": 2, "same": 4, "wide": 1}


def assert_equals_xla(
    pattern: BlockPattern,
    groups: int,
    mask: CausalMask,
    width: int,
    mesh: Mesh | None = None,
) -> None:
    """Checks output and gradients of tokens."""
    batch, length = mask.key_mask.shape
    mask = with_blocks(mask, pattern, groups)
    heads = (pattern.heads // groups, groups)
    arrays = random_arrays(batch, length, length, heads, width)
    weight = random_arrays(batch, length, 1, heads, width)[0] * mask.key_mask[:, :, None, None, None]

    def run(mask: CausalMask, *arrays: jax.Array) -> jax.Array:
        return attention(*arrays, mask, scale=SCALE, mesh=mesh, implementation="pallas")[0]

    @jax.jit
    def both(mask: CausalMask, *arrays: jax.Array) -> tuple:
        actual = gradients_and_output(partial(run, mask), weight)(*arrays)
        return actual, dense_gradients_and_output(mask, weight)(*arrays)

    (gradients, out), (expected_gradients, expected) = both(mask, *arrays)
    assert np.isfinite(out).all()
    tokens = mask.key_mask
    assert_close(np.asarray(out)[tokens], np.asarray(expected)[tokens])
    jax.tree.map(assert_close, gradients, expected_gradients)


@pytest.mark.parametrize(
    ("name", "padding", "width"),
    [
        ("gqa", "left", 128),
        slow("gqa", "right", 64),
        slow("step", "right", 64),
        slow("step", "left", 128),
        slow("same", "left", 64),
        slow("wide", "none", 128),
    ],
)
def test_patterns_and_padding_equal_xla(name: str, padding: str, width: int) -> None:
    """700 tokens are two blocks of queries, and no multiple of a block of keys."""
    assert_equals_xla(PATTERNS[name], GROUPS[name], prefill_mask(padding, 2, 700, None), width)


def test_padding_between_tokens_equals_xla() -> None:
    mask = prefill_mask("none", 1, 300, None)
    mask.key_mask[:, 40:75] = mask.key_mask[:, 290:] = False
    assert_equals_xla(PATTERNS["gqa"], 3, mask, 64)


@pytest.mark.parametrize("length", [slow(1024), slow(1025), slow(1300)])
def test_the_published_pattern_equals_xla(length: int) -> None:
    """Up to 1,024 tokens it hides nothing."""
    pattern = BlockPattern(size=64, local=16, stride=8, heads=16)
    assert_equals_xla(pattern, 4, prefill_mask("left", 2, length, None), 64)


@pytest.mark.parametrize("axis", ["tensor", slow("context")])
def test_a_mesh_equals_xla(axis: str) -> None:
    """The two devices of `tensor` have heads with other patterns; those of `context` half of the queries."""
    sizes = [2 if name == axis else 1 for name in ("data", "fsdp", "context", "tensor")]
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(sizes), ("data", "fsdp", "context", "tensor"))
    assert_equals_xla(PATTERNS["gqa"], 3, prefill_mask("left", 2, 768, None), 64, mesh)


@pytest.mark.parametrize("pattern", [PATTERNS["gqa"], PHI_3_SMALL])
@pytest.mark.parametrize("length", [512, 1500])
def test_computes_every_tile_that_a_query_sees(pattern: BlockPattern, length: int) -> None:
    layout = block_splash._layout(pattern, length, 1)
    mask = block_splash._BlockMask(layout)
    seen = np.zeros(mask.shape, bool)
    slots = np.arange(mask.shape[1])[None]
    for phase in range(pattern.stride):
        positions = mask.q_sequence[:, None]
        numbers = layout.count_far(positions, phase) << layout.bits | positions
        seen |= np.asarray(mask.mask_function(numbers, slots))
    for query in range(0, mask.shape[0], 128):
        for key in range(0, mask.shape[1], 128):
            index = slice(query, query + 128), slice(key, key + 128)
            assert mask[index][0] == seen[index].any()


@pytest.mark.parametrize(("length", "shares"), [(8192, [0.508] * 3), (131072, [0.162, 0.150, 0.162])])
def test_computes_a_share_of_the_scores(length: int, shares: list[float]) -> None:
    """Heads see 32 % of the causal scores at 8,192 tokens, and 14 % at 131,072."""
    kernel = block_splash.make_kernel(PHI_3_SMALL, length)
    sizes = kernel.kwargs["block_sizes"]
    passes = [
        (kernel.fwd_mask_info, sizes.block_q * sizes.block_kv),
        (kernel.dq_mask_info, sizes.block_q_dq * sizes.block_kv_dq),
        (kernel.dkv_mask_info, sizes.block_q_dkv * sizes.block_kv_dkv),
    ]
    causal = length * (length + 1) / 2
    computed = [np.count_nonzero(info.block_mask) * area / causal for info, area in passes]
    assert computed == pytest.approx(shares, abs=1e-3)


def test_a_long_kernel_is_small() -> None:
    kernel = block_splash.make_kernel(PHI_3_SMALL, 131072)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) < 4e6


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({"size": 48}, 1),  # tokens are counted by shifting bits
        ({"size": 1, "stride": 2}, 1),  # 65,536 far blocks, and 131,072 positions, do not fit into one number
    ],
)
def test_leaves_other_patterns_to_xla(change: dict, context: int) -> None:
    pattern = BlockPattern(**{"size": 64, "local": 2, "stride": 2, "heads": 1, **change})
    mask = with_blocks(prefill_mask("none", 1, 131072, None), pattern, 1)
    assert not block_splash.fits(mask, context=context)


# For TPUs that are absent


def kernel_gradients(pattern: BlockPattern, *arguments: jax.Array) -> tuple:
    """Returns the gradients of queries, keys and values; the last argument says which slots are tokens."""
    *arrays, key_mask = arguments
    length, groups, width = arrays[0].shape[1], *arrays[0].shape[3:]
    kernel = block_splash.make_kernel(pattern, length)
    shifts = pattern.shifts.reshape(-1, groups)
    run = partial(block_splash.attend, kernel, shifts=shifts, scale=1 / width)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(block_splash.with_tokens_first(run, *arrays, key_mask).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)


def test_lowers_for_a_tpu() -> None:
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in random_arrays(1, 300, 300, (2, 3), 96)]
    run = jax.jit(partial(kernel_gradients, PATTERNS["gqa"]))
    lowered = run.trace(*arrays, jax.ShapeDtypeStruct((1, 300), bool)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.mark.slow
def test_compiles_at_the_published_shape_for_a_tpu(tpu_mesh: Mesh) -> None:
    """Forward and backward at 8,192 tokens, without memory of length squared."""
    length, heads, width = 8192, (8, 4), 128
    sharding = NamedSharding(Mesh(tpu_mesh.devices[:1], ("context",)), PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
    query, key = shape((1, length, *heads, width)), shape((1, heads[0], length, width))
    key_mask = jax.ShapeDtypeStruct((1, length), bool, sharding=sharding)
    run = jax.jit(partial(kernel_gradients, PHI_3_SMALL))
    program = run.lower(query, key, key, key_mask).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    # A causal kernel takes two times the queries.
    assert program.memory_analysis().temp_size_in_bytes < 6 * query.size * 2


@pytest.mark.slow
def test_compiles_for_a_mesh_of_a_tpu(tpu_mesh: Mesh) -> None:
    """Each device has half of the heads and half of the queries."""
    mesh = Mesh(tpu_mesh.devices.reshape(1, 1, 2, 2), ("data", "fsdp", "context", "tensor"))

    def shape(array: np.ndarray, *axes: str | None, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=sharding)

    query, key, _ = random_arrays(1, 2048, 2048, (8, 4), 128)
    mask = with_blocks(prefill_mask("left", 1, 2048, None), PHI_3_SMALL, 4)
    queries = shape(query, None, "context", "tensor", dtype=jnp.bfloat16)
    keys = shape(key, None, "tensor", dtype=jnp.bfloat16)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalMask) -> jax.Array:
        return attention(query, key, value, mask, scale=SCALE, mesh=mesh)[0].astype(jnp.float32).sum()

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    program = run.lower(queries, keys, keys, jax.tree.map(shape, mask)).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
