"""Compares block-sparse attention over stripes with the pattern written out, and with XLA's over all keys."""

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
from block_cases import masked_softmax, visible_keys, with_blocks
from marks import slow

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels.dispatch import choose_kernels
from phi3_jax.model.kernels.striped import striped_attention
from phi3_jax.parallel.sharding import make_mesh

SMALL = BlockPattern(size=16, local=2, stride=3, heads=4)
ALIKE = BlockPattern(size=16, local=3, stride=4, heads=6, same_for_all_heads=True)
WIDE = BlockPattern(size=160, local=1, stride=8, heads=2)


@pytest.mark.parametrize(
    ("pattern", "kv_heads", "width", "padding", "length"),
    [
        (SMALL, 2, 64, "left", 333),
        (SMALL, 4, 96, "right", 130),
        slow(ALIKE, 1, 128, "none", 500),
        slow(ALIKE, 2, 64, "left", 97),
        (WIDE, 1, 32, "left", 500),
        slow(SMALL, 1, 64, "none", 40),
    ],
)
def test_equals_the_formula_and_xla(
    pattern: BlockPattern, kv_heads: int, width: int, padding: str, length: int
) -> None:
    """Also the gradients, of which padding has none. Rows have other numbers of tokens."""
    plain = prefill_mask(padding, 2, length, None)
    groups = pattern.heads // kv_heads
    mask = with_blocks(plain, pattern, groups)
    arrays = random_arrays(2, length, length, (kv_heads, groups), width)
    weight = random_arrays(2, length, 1, (kv_heads, groups), width)[0]
    weight = weight * plain.key_mask[:, :, None, None, None]

    def attend(*arrays: jax.Array) -> jax.Array:
        return striped_attention(*arrays, mask, scale=SCALE)

    @jax.jit
    def both(*arrays: jax.Array) -> tuple:
        return gradients_and_output(attend, weight)(*arrays), dense_gradients_and_output(mask, weight)(
            *arrays
        )

    (gradients, out), (expected_gradients, expected) = both(*arrays)
    tokens = plain.key_mask
    assert_close(np.asarray(out)[tokens], np.asarray(expected)[tokens])
    assert (np.asarray(out)[~tokens] == 0).all()
    formula = masked_softmax(*arrays, visible_keys(plain, pattern), SCALE)
    assert_close(np.asarray(out)[tokens], formula[tokens])
    jax.tree.map(assert_close, gradients, expected_gradients)


def test_takes_less_memory_than_all_keys() -> None:
    """The scores of 128 queries take most of it."""
    mask = with_blocks(prefill_mask("none", 1, 4096, None), SMALL, 2)
    arrays = random_arrays(1, 4096, 4096, (2, 2), 8)

    def temporary(implementation: str | None) -> int:
        run = jax.jit(partial(attention, mask=mask, scale=SCALE, implementation=implementation))
        return run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(None) < temporary("xla") / 2


@pytest.mark.slow
def test_devices_of_a_mesh_have_the_patterns_of_their_own_heads() -> None:
    mask = with_blocks(prefill_mask("left", 4, 130, None), SMALL, 2)
    arrays = random_arrays(4, 130, 130, (2, 2), 16)
    assert choose_kernels(*map(jnp.asarray, arrays[:2]), mask, None, platform="cpu")["cpu"] == "striped"
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    run = jax.jit(lambda *arrays: attention(*arrays, mask, scale=SCALE, mesh=mesh)[0])
    assert_close(np.asarray(run(*arrays)), np.asarray(striped_attention(*arrays, mask, scale=SCALE)))
