"""Tests splash attention: interpreted against XLA's attention, and compiled for absent TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    HEADS,
    SCALE,
    assert_close,
    assert_close_where_visible,
    dense_gradients_and_output,
    gradients_and_output,
    prefill_mask,
    product,
    random_arrays,
)
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from marks import slow

from phi3_jax.model.kernels import splash
from phi3_jax.model.masks import CausalMask


def token_weights(mask: CausalMask) -> np.ndarray:
    """Returns factors that leave padding out of the loss, as training does."""
    return mask.key_mask[:, :, None, None, None]


def assert_equals_xla(
    batch: int, length: int, heads: tuple[int, int], width: int, window: int | None, padding: str
) -> None:
    """Checks output and gradients."""
    mask = prefill_mask(padding, batch, length, window)
    arrays = random_arrays(batch, length, length, heads, width)
    kernel = splash.make_kernel(heads[1], length, window, interpret=True)

    def run(*arrays: jax.Array) -> jax.Array:
        return splash.attend(kernel, *arrays, mask.key_mask, SCALE)

    weight = random_arrays(batch, length, 1, heads, width)[0] * token_weights(mask)

    @jax.jit
    def both(*arrays: jax.Array) -> tuple:
        return gradients_and_output(run, weight)(*arrays), dense_gradients_and_output(mask, weight)(*arrays)

    (gradients, out), (expected_gradients, expected) = both(*arrays)
    assert_close_where_visible(out, expected, mask)
    jax.tree.map(assert_close, gradients, expected_gradients)


@pytest.mark.parametrize(
    ("padding", "window"),
    product(["none", "left", "right"], [None, 40, 500], always=[("right", 40)]),
)
def test_padding_and_windows_equal_xla(padding: str, window: int | None) -> None:
    """Blocks are of 384: windows lie within one or span two."""
    assert_equals_xla(2, 700, HEADS["gqa"], 64, window, padding)


@pytest.mark.parametrize(("heads", "width"), product(list(HEADS), [64, 96, 128], always=[("mha", 96)]))
def test_heads_and_widths_equal_xla(heads: str, width: int) -> None:
    assert_equals_xla(2, 200, HEADS[heads], width, None, "left")


def test_queries_without_a_visible_key_stay_finite() -> None:
    arrays = random_arrays(2, 256, 256, HEADS["gqa"], 64)
    key_mask = np.array([[False], [True]]) & (np.arange(256) >= 200)
    kernel = splash.make_kernel(3, 256, None, interpret=True)
    run = gradients_and_output(lambda *arrays: splash.attend(kernel, *arrays, key_mask, SCALE), arrays[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(run)(*arrays)))


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize(("block", "length"), [((128, 128), 512), ((256, 128), 512), ((128, 256), 768)])
def test_knows_which_blocks_are_visible(window: int | None, block: tuple[int, int], length: int) -> None:
    mask = splash._CausalBlocks(length, window)
    dense = np.asarray(prefill_mask("none", 1, length, window).dense())[0, 0]
    for query in range(0, length, block[0]):
        for key in range(0, length, block[1]):
            index = slice(query, query + block[0]), slice(key, key + block[1])
            np.testing.assert_array_equal(mask[index], [dense[index].any(), dense[index].all()])


@pytest.mark.parametrize("window", [slow(None), 700])
def test_parts_of_the_queries_equal_xla(window: int | None) -> None:
    """Each device of a context axis has half of the queries, in two blocks, and all keys."""
    parts, length, heads = 2, 1536, (1, 2)
    mask = prefill_mask("left", 2, length, window)
    query, key, value = random_arrays(2, length, length, heads, 64)
    weight = query * token_weights(mask)
    kernel = splash.make_kernel(heads[1], length, window, shards=parts, interpret=True)
    specs = splash.kernel_specs(kernel, AbstractMesh((parts,), ("context",)), "context")

    def part(x: np.ndarray, spec: PartitionSpec, index: int) -> np.ndarray:
        return np.split(x, parts, axis=list(spec).index("context"))[index]

    @jax.jit
    def run(leaves: list, weight: jax.Array, *arrays: jax.Array) -> tuple:
        kernel = jax.tree.unflatten(jax.tree.structure(specs), leaves)
        attend = partial(splash.attend, kernel, key_mask=mask.key_mask, scale=SCALE)
        return gradients_and_output(attend, weight)(*arrays)

    outs, gradients = [], []
    for index in range(parts):
        leaves = [
            part(x, spec, index) for x, spec in zip(*map(jax.tree.leaves, (kernel, specs)), strict=True)
        ]
        own = np.s_[:, index * length // parts : (index + 1) * length // parts]
        gradient, out = run(leaves, weight[own], query[own], key, value)
        outs.append(out)
        gradients.append(gradient)
    query_gradients, key_gradients, value_gradients = zip(*gradients, strict=True)
    expected_gradients, expected = jax.jit(dense_gradients_and_output(mask, weight))(query, key, value)
    assert_close_where_visible(np.concatenate(outs, axis=1), expected, mask)
    assert_close(np.concatenate(query_gradients, axis=1), expected_gradients[0])
    assert_close(sum(key_gradients), expected_gradients[1])
    assert_close(sum(value_gradients), expected_gradients[2])


def test_rejects_parts_that_are_not_whole_tiles() -> None:
    with pytest.raises(ValueError, match=r"1000 tokens .* context=4 .* pad them to 1024"):
        splash.make_kernel(1, 1000, None, shards=4)


def test_a_long_kernel_is_small() -> None:
    kernel = splash.make_kernel(4, 131072, None)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) < 4e6


# For TPUs that are absent


def kernel_gradients(query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array) -> tuple:
    kernel = splash.make_kernel(query.shape[3], query.shape[1], None)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(splash.attend(kernel, *arrays, key_mask, SCALE).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


def test_lowers_for_a_tpu() -> None:
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in random_arrays(1, 300, 300, (2, 2), 96)]
    run = jax.jit(kernel_gradients).trace(*arrays, jax.ShapeDtypeStruct((1, 300), bool))
    text = run.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


def test_takes_no_memory_of_length_squared_on_a_tpu(tpu_mesh: Mesh) -> None:
    length, heads, width = 32768, (2, 2), 96
    sharding = NamedSharding(Mesh(tpu_mesh.devices[:1], ("context",)), PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
    query, key = shape((1, length, *heads, width)), shape((1, heads[0], length, width))
    key_mask = jax.ShapeDtypeStruct((1, length), bool, sharding=sharding)
    program = jax.jit(kernel_gradients).lower(query, key, key, key_mask).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < length**2 / 4  # one bit a score would take half of that
    assert temporary < 12 * query.size * 2


def test_compiles_for_the_context_axis_of_a_tpu(tpu_mesh: Mesh) -> None:
    length, heads, width = 4096, (2, 2), 96
    kernel = splash.make_kernel(heads[1], length, None, shards=4)
    whole, divided = PartitionSpec(), PartitionSpec(None, "context")
    run = jax.shard_map(
        lambda *args: splash.attend(*args, SCALE),
        mesh=tpu_mesh,
        in_specs=(splash.kernel_specs(kernel, tpu_mesh, "context"), divided, whole, whole, whole),
        out_specs=divided,
        check_vma=False,
    )

    def loss(*arrays: jax.Array) -> jax.Array:
        *arrays, key_mask = arrays
        return jnp.sum(run(kernel, *arrays, key_mask).astype(jnp.float32))

    def shape(spec: PartitionSpec, *shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu_mesh, spec))

    arrays = shape(divided, 1, length, *heads, width), *[shape(whole, 1, heads[0], length, width)] * 2
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = program.lower(*arrays, shape(whole, 1, length, dtype=bool)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
