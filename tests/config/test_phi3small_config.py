"""Tests `Phi3SmallConfig`: its spelling, its defaults, its rules, its rope."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import Phi3Config, Phi3SmallConfig, RopeScaling
from phi3_jax.errors import UserError

LISTS = {
    "short_factor": [1.0 + 0.1 * i for i in range(64)],
    "long_factor": [2.0 + 0.5 * i for i in range(64)],
}
LONG = {"max_position_embeddings": 131072, "rope_scaling": {"type": "su", **LISTS}}

UNREAD = {"model_type", "use_cache", "gegelu_pad_to_256", "auto_map"}


def read(**values):
    return Phi3Config.from_dict({"model_type": "phi3small", **values})


def test_reads_the_published_config(shared_data, caplog):
    path = shared_data("phi3-configs", "phi-3-small-8k-instruct", "config.json")
    config, raw = Phi3Config.from_pretrained(path), json.loads(path.read_text())
    assert isinstance(config, Phi3SmallConfig)
    assert not caplog.records
    for name in raw.keys() - UNREAD - {"ff_dim_multiplier"}:
        assert getattr(config, name, config.extra.get(name)) == raw[name], name
    preset = Phi3Config.preset("phi-3-small-8k-instruct")
    assert preset.replace(extra={}) == config.replace(extra={})
    assert "auto_map" not in config.extra
    written = config.to_dict()
    assert {name: written[name] for name in raw.keys() - UNREAD} == {n: raw[n] for n in raw.keys() - UNREAD}
    assert Phi3Config.from_dict(json.loads(json.dumps(written))) == config


def test_reads_what_is_published_of_the_128k_config(shared_data):
    path = shared_data("phi3-configs", "phi-3-small-128k-instruct", "config.partial.json")
    config = read(**(json.loads(path.read_text()) | LONG))
    assert config.context_length == 131072
    assert config.original_max_position_embeddings == 8192


def test_defaults_are_those_of_the_8k_model():
    assert read() == Phi3SmallConfig()
    assert Phi3SmallConfig().replace(extra={}) == Phi3Config.preset("phi-3-small-8k-instruct").replace(
        extra={}
    )
    assert Phi3SmallConfig().tie_word_embeddings
    assert (Phi3SmallConfig().rope_theta, Phi3SmallConfig().attention_scale) == (1e6, 1 / 128)


def test_reads_and_replaces_by_either_name():
    config = read(ff_intermediate_size=64, layer_norm_epsilon=1e-6, rope_embedding_base=500.0)
    assert (config.intermediate_size, config.ff_intermediate_size) == (64, 64)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 500.0)
    assert config.replace(ff_intermediate_size=32) == config.replace(intermediate_size=32)
    with pytest.raises(UserError, match=r"ffn_dropout_prob=0\.1 contradicts resid_pdrop=0"):
        config.replace(ffn_dropout_prob=0.1, resid_pdrop=0.0)
    with pytest.raises(AttributeError, match="Phi3SmallConfig has no field 'ff_size'"):
        _ = config.ff_size


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ff_dim_multiplier": 2}, 4096),  # 2 * (3072 // 3) * 2
        ({"ff_dim_multiplier": 1.1}, 2304),  # 2252, rounded up to 256
        ({"ff_dim_multiplier": 1.1, "gegelu_pad_to_256": False}, 2252),
        ({"ff_dim_multiplier": 2, "ff_intermediate_size": None}, 4096),
    ],
)
def test_size_of_the_mlp_from_a_multiplier(values, expected):
    config = read(hidden_size=3072, **values)
    assert config.intermediate_size == expected
    assert read(**config.to_dict()) == config


@pytest.mark.parametrize(
    "values",
    [{"ff_dim_multiplier": 2, "ff_intermediate_size": 64}, {"ff_intermediate_size": None}],
)
def test_rejects_both_or_neither_size_of_the_mlp(values):
    with pytest.raises(UserError, match="give exactly one of them, and null for the other"):
        read(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocksparse_triton_kernel_block_size": 48}, "=48 does not divide blocksparse_block_size=64"),
        ({"blocksparse_block_size": 0}, "blocksparse_block_size=0 must be a positive integer"),
        ({"blocksparse_vert_stride": 2.5}, "blocksparse_vert_stride=2.5 must be a positive integer"),
        ({"blocksparse_homo_head_pattern": 1}, "blocksparse_homo_head_pattern=1 must be true or false"),
        ({"dense_attention_every_n_layers": 0}, "=0 must be a positive integer, or None for no dense layer"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 does not divide num_attention_heads=32"),
        ({"hidden_act": "silu"}, "hidden_act='silu' must be 'gegelu', the only one"),
        ({"gegelu_limit": -1}, "gegelu_limit=-1 must be a positive number, or None for no limit"),
        ({"mup_attn_multiplier": 0}, "mup_attn_multiplier=0 must be a positive number"),
        ({"mup_width_multiplier": -8}, "mup_width_multiplier=-8 must be a positive number, or None or 0"),
        ({"mup_embedding_multiplier": "8"}, "mup_embedding_multiplier='8' must be a number, or None"),
        ({"ff_dim_multiplier": -1}, "ff_dim_multiplier=-1 must be a positive number"),
        ({"intermediate_size": 64, "ff_intermediate_size": 32}, "=32 contradicts intermediate_size=64"),
        ({"rope_scaling": "su"}, "rope_scaling='su' must be a mapping"),
        ({"rope_scaling": {"type": ["su"]}}, r"rope_scaling\['type'\]=\['su'\] must be the name"),
        ({"head_dim": 64}, "head_dim=64 is not hidden_size=4096 divided by num_attention_heads=32"),
        ({"sliding_window": 2047}, "sliding_window=2047 must be None: the model has no window"),
    ],
)
def test_rejects_invalid_values(values, message):
    with pytest.raises(UserError, match=message):
        read(**values)


def test_layers_that_are_dense():
    assert [layer for layer in range(6) if not read().is_sparse(layer)] == [1, 3, 5]
    third = read(dense_attention_every_n_layers=3)
    assert [layer for layer in range(6) if not third.is_sparse(layer)] == [2, 5]
    assert all(read(dense_attention_every_n_layers=None).is_sparse(layer) for layer in range(6))
    assert not Phi3Config().is_sparse(0)


def frequencies(config, length):
    inv_freq, factor = config.rope_scaling.frequencies(config.rope_base, jnp.array([length]))
    return np.asarray(inv_freq)[0], float(np.asarray(factor).reshape(-1)[0])


@pytest.mark.parametrize(
    ("mscale", "short", "long"),
    [
        ({}, 1.0, 1.1435437498),
        ({"short_mscale": 1.1, "long_mscale": 1.3}, 1.1, 1.3),
        ({"short_mscale": -1, "long_mscale": 0}, 1.0, 1.1435437498),
    ],
)
def test_longrope(mscale, short, long):
    config = read(**LONG, original_max_position_embeddings=8192)
    config = read(**(config.to_dict() | {"rope_scaling": {"type": "su", **LISTS, **mscale}}))
    powers = 1e6 ** (np.arange(0, 128, 2) / 128)
    for length, name, factor in ((8192, "short_factor", short), (8193, "long_factor", long)):
        inv_freq, found = frequencies(config, length)
        np.testing.assert_allclose(inv_freq, 1 / (np.array(LISTS[name]) * powers), rtol=1e-6)
        assert found == pytest.approx(factor, rel=1e-7)
    assert config.rope_scaling.switches_at(config.rope_base) == 8192


def test_longrope_survives_a_round_trip():
    entry = {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 4096}
    config = read(max_position_embeddings=65536, rope_scaling=entry)
    written = config.to_dict()
    assert config.original_max_position_embeddings == 4096
    assert written["rope_scaling"]["type"] == "longrope"
    assert written["rope_scaling"]["original_max_position_embeddings"] == 4096
    assert Phi3Config.from_dict(written) == config
    assert frequencies(config, 9999)[1] == pytest.approx(
        math.sqrt(1 + math.log(16) / math.log(4096)), rel=1e-7
    )


def test_rejects_an_unknown_key_of_longrope():
    with pytest.raises(UserError, match="rope type 'phi3small' has no use for factor"):
        read(**(LONG | {"rope_scaling": {**LONG["rope_scaling"], "factor": 16.0}}))


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.7}, {"factor": 4.0}, {"long_mscale": 1.2}])
def test_keeps_the_attention_factors_of_phi3s_longrope(changes):
    """A scaling that was searched or given by --rope has the same numbers in the config."""
    scaling = RopeScaling.from_dict({"rope_type": "longrope", **LISTS, **changes})
    config = read(max_position_embeddings=131072).replace(rope_scaling=scaling)
    for length in (8192, 8193):
        expected = scaling.frequencies(config.rope_base, jnp.array([length]))
        inv_freq, factor = frequencies(config, length)
        np.testing.assert_array_equal(inv_freq, np.asarray(expected[0])[0])
        assert factor == pytest.approx(float(np.asarray(expected[1]).reshape(-1)[0]), rel=1e-6)
    assert Phi3Config.from_dict(config.to_dict()) == config


def test_a_rope_of_another_type_stays():
    config = read(rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert config.rope_scaling == RopeScaling.from_dict({"rope_type": "linear", "factor": 4.0})
    assert Phi3Config.from_dict(config.to_dict()) == config


def test_each_family_reads_its_own_model_type():
    assert type(Phi3SmallConfig.from_dict({"model_type": "phi3"})) is Phi3Config
    assert type(Phi3SmallConfig.from_dict({"model_type": "llama", "vocab_size": 40000})) is Phi3Config
    assert type(Phi3SmallConfig.from_dict({})) is Phi3SmallConfig


def test_ids_that_stand_for_no_token():
    assert len(Phi3SmallConfig().dummy_token_ids) == 91
    assert Phi3SmallConfig(vocab_size=100, bos_token_id=1, eos_token_id=2).dummy_token_ids == ()
