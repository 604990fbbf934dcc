"""Tests the counts of a plan for Phi-3-small: visible pairs, blocks that a decode step reads, projections."""

import numpy as np
import pytest
from phi3small import small_config, visible_mask

from phi3_jax import Phi3Config
from phi3_jax.costs.flops import attention_pairs, model_pairs, step_flops
from phi3_jax.costs.shapes import layer_projections, parameters
from phi3_jax.costs.work import Work
from phi3_jax.plan.analytic import analyse

PUBLISHED = Phi3Config.preset("phi-3-small-8k-instruct")


@pytest.mark.parametrize(
    "changes", [{}, {"blocksparse_homo_head_pattern": True}, {"blocksparse_vert_stride": 9}]
)
@pytest.mark.parametrize(("queries", "keys"), [(61, 61), (1, 61), (20, 61), (1, 64), (9, 12)])
def test_visible_pairs_match_the_mask(changes, queries, keys):
    config = small_config(**changes)
    mask = visible_mask(config.to_dict(), keys)[:, keys - queries :]
    assert config.block_pattern.visible_pairs(queries, keys) == mask.sum()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_share_of_the_keys_that_a_step_reads(kv_heads):
    config = small_config(num_key_value_heads=kv_heads)
    keys = 96  # twelve whole blocks
    seen = visible_mask(config.to_dict(), keys)[:, -1].reshape(kv_heads, -1, keys).any(axis=1)
    blocks = seen.reshape(kv_heads, -1, 8).any(axis=2)
    assert config.block_pattern.read_share(keys, kv_heads) == pytest.approx(blocks.mean())


def test_pairs_of_a_model_are_those_of_its_sparse_and_dense_layers():
    sparse, dense = (
        PUBLISHED.block_pattern.visible_pairs(8192, 8192),
        32 * attention_pairs(PUBLISHED, 8192, 8192),
    )
    assert sparse == 4 * (sum_of_patterns := sum(published_pairs()))
    assert sum_of_patterns == pytest.approx(8 * 0.3242 * dense / 32, rel=1e-3)
    assert model_pairs(PUBLISHED, 8192, 8192) == 16 * (sparse + dense)


def published_pairs():
    """Yields the visible pairs of each of the eight patterns at 8,192 tokens, block by block."""
    for shift in range(8):
        seen = [
            min(a + 1, 16) * 64 - 32 + 0.5 + 64 * sum((b + shift + 1) % 8 == 0 for b in range(a - 15))
            for a in range(128)
        ]
        yield int(64 * sum(seen))


@pytest.mark.parametrize(("keys", "share"), [(1024, 1.0), (8192, 0.5625), (131072, 0.5039)])
def test_share_of_the_published_model(keys, share):
    assert PUBLISHED.block_pattern.read_share(keys, 8) == pytest.approx(share, abs=1e-4)


def test_a_decode_step_reads_half_of_a_sparse_layers_cache():
    near, far = (analyse(Work(PUBLISHED, "decode", 4, seq), {}) for seq in (1024, 8192))
    cache = far.cache_bytes
    weights = near.hbm_traffic_bytes - near.cache_bytes
    assert far.hbm_traffic_bytes - weights == pytest.approx(cache * (1 + 0.5625) / 2)


def test_projections_and_biases():
    assert {p.role: p.name for p in layer_projections(PUBLISHED)} == {
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "gate_up_proj": "up_proj",
        "down_proj": "down_proj",
    }
    biases = sum(p.size for p in parameters(PUBLISHED) if p.is_bias)
    assert biases == 32 * (6144 + 4096 + 28672 + 4096 + 2 * 4096) + 4096
    whole = sum(p.size for p in parameters(PUBLISHED))
    assert whole == 7_392_272_384


def test_remat_repeats_only_what_is_not_kept():
    full = step_flops(Work(PUBLISHED, "finetune", 1, 512, remat="full"))
    dots = step_flops(Work(PUBLISHED, "finetune", 1, 512, remat="dots"))
    layer = {p.role: p.size for p in layer_projections(PUBLISHED)}
    repeated = 2 * 512 * (layer["qkv_proj"] + layer["o_proj"] + layer["gate_up_proj"])
    assert full.recomputed - dots.recomputed == repeated


def test_quantized_bytes_leave_biases_as_they_are():
    floats, int8 = (
        analyse(Work(PUBLISHED, "decode", 1, 1024, quantization=name), {}) for name in (None, "int8")
    )
    projections = sum(p.size for p in layer_projections(PUBLISHED))
    scales = 4 * sum(p.count * p.outputs for p in layer_projections(PUBLISHED))
    assert floats.parameter_bytes - int8.parameter_bytes == projections - scales
    assert np.isfinite(int8.hbm_traffic_bytes)
