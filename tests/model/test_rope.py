"""Tests rope in the model: each row's list, frequencies from the caller, types that transformers rejects."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from reference import (
    HALF_ROTARY,
    LONG,
    SHORT,
    alone,
    distance,
    longrope,
    pair,
    random_ids,
    run,
    run_theirs,
    small_vocabulary_config,
)

from phi3_jax import Phi3ForCausalLM
from phi3_jax.model.rope import rope_tables

TOLERANCE = 1e-5
LENGTH = 20
ORIGINAL = 12


def mask_of_lengths(lengths, side):
    """Returns a mask of rows with these numbers of tokens, padded on `side`."""
    positions, counts = np.arange(LENGTH), np.array(lengths)[:, None]
    return (positions >= LENGTH - counts if side == "left" else positions < counts).astype(np.int64)


# Each row's list


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("partial", [False, True])
def test_each_row_has_the_list_of_its_own_length(partial, side, tmp_path):
    half = longrope(ORIGINAL, **HALF_ROTARY) | {"partial_rotary_factor": 0.5}
    config = small_vocabulary_config(**(half if partial else longrope(ORIGINAL)))
    ours, theirs = pair("causal", config, tmp_path)
    lengths = [LENGTH, 5, ORIGINAL, ORIGINAL + 1]
    mask = mask_of_lengths(lengths, side)
    ids = random_ids(config, mask)
    out = run(ours, input_ids=ids, attention_mask=mask)
    token = mask.astype(bool)[..., None]
    assert distance(out.logits, alone(theirs, ids, mask), token) <= TOLERANCE
    # For a whole batch, the reference takes one list for all rows.
    batch = run_theirs(theirs, ids, mask).logits
    rows = np.array([n <= ORIGINAL for n in lengths])[:, None, None]
    assert distance(out.logits, batch, token & rows) > 1e-3
    assert distance(out.logits, batch, token & ~rows) <= TOLERANCE


def test_a_row_as_long_as_the_original_window_is_short():
    config = small_vocabulary_config(**longrope(ORIGINAL))
    at = jnp.ones((2, 1), jnp.int32)
    cos, sin = rope_tables(config, at, jnp.array([ORIGINAL, ORIGINAL + 1]))
    angles = np.arctan2(sin, cos)[:, 0]
    plain = 1e4 ** -(np.arange(6) / 6)
    np.testing.assert_allclose(angles[0], plain / SHORT, rtol=1e-5)
    np.testing.assert_allclose(angles[1], plain / LONG, rtol=1e-5)
    growth = np.sqrt(1 + np.log(64 / ORIGINAL) / np.log(ORIGINAL))
    np.testing.assert_allclose(np.hypot(cos, sin), growth, rtol=1e-6)


def test_rope_length_chooses_the_list(tmp_path):
    """A first chunk is shorter than the original window, and has the length of the whole prompt."""
    config = small_vocabulary_config(**longrope(ORIGINAL))
    ours, theirs = pair("causal", config, tmp_path)
    ids = random_ids(config, np.ones((2, LENGTH), np.int64))
    whole = alone(theirs, ids, np.ones_like(ids))
    first = np.asarray(run(ours, input_ids=ids[:, :8], rope_length=np.array([LENGTH, LENGTH])).logits)
    assert distance(first, whole[:, :8]) <= TOLERANCE
    without = np.asarray(run(ours, input_ids=ids[:, :8]).logits)
    assert distance(without, whole[:, :8]) > 1e-3
    mixed = np.asarray(run(ours, input_ids=ids[:, :8], rope_length=np.array([LENGTH, 8])).logits)
    np.testing.assert_array_equal(mixed[0], first[0])
    np.testing.assert_array_equal(mixed[1], without[1])


def test_a_cache_keeps_its_list(tmp_path):
    """Tokens after a prompt with the long list have the long list."""
    config = small_vocabulary_config(**longrope(ORIGINAL))
    ours, theirs = pair("causal", config, tmp_path)
    ids = random_ids(config, np.ones((2, LENGTH), np.int64))
    whole = alone(theirs, ids, np.ones_like(ids))
    cache = ours.init_cache(2, LENGTH)
    out = run(ours, input_ids=ids[:, :6], past_key_values=cache, rope_length=np.array([LENGTH, LENGTH]))
    out = run(ours, input_ids=ids[:, 6:10], past_key_values=out.past_key_values)
    assert distance(out.logits, whole[:, 6:10]) <= TOLERANCE
    np.testing.assert_array_equal(out.past_key_values.rope_length, [LENGTH, LENGTH])


def needs_recomputation(config, before, after):
    """Returns which rows need recomputation of their cache after growing from `before` to `after` tokens."""
    return config.rope_scaling.needs_recomputation(config.rope_base, before, after)


def test_rows_that_change_their_list_need_recomputation():
    before, after = jnp.array([0, 1, 12, 12, 13, 5, 20]), jnp.array([20, 12, 12, 13, 20, 20, 12])
    changing = [False, False, False, True, False, True, True]
    for name in ("longrope", "su", "yarn"):
        config = small_vocabulary_config(**longrope(12, type=name))
        np.testing.assert_array_equal(needs_recomputation(config, before, after), changing)
    assert not needs_recomputation(small_vocabulary_config(), before, after).any()


# Frequencies from the caller


def test_given_frequencies_replace_those_of_the_config(tmp_path):
    plain, _ = pair("causal", small_vocabulary_config(), tmp_path)
    config = small_vocabulary_config(**longrope(ORIGINAL, short_mscale=1.1, long_mscale=1.6))
    scaled = Phi3ForCausalLM.from_pretrained(tmp_path, config=config)
    lengths = np.array([LENGTH, 5])
    mask = mask_of_lengths(lengths, "left")
    ids = random_ids(config, mask)
    token = mask.astype(bool)[..., None]
    expected = np.asarray(run(scaled, input_ids=ids, attention_mask=mask).logits)
    rows, scaling = config.rope_scaling.frequencies(config.rope_base, lengths)
    by_row = run(
        plain,
        input_ids=ids,
        attention_mask=mask,
        inv_freq=np.asarray(rows),
        attention_scaling=np.asarray(scaling),
    )
    assert distance(by_row.logits, expected, token) <= TOLERANCE
    for row in range(2):
        for_all = run(
            plain,
            input_ids=ids,
            attention_mask=mask,
            inv_freq=np.asarray(rows[row]),
            attention_scaling=float(scaling[row]),
        )
        assert distance(for_all.logits[row], expected[row], token[row]) <= TOLERANCE
        assert distance(for_all.logits[1 - row], expected[1 - row], token[1 - row]) > 1e-3


@stored(whole=True)
def logits_with_angles(theirs, ids, plain, factors):
    """Returns the reference's logits with plain rope for the first `plain` [B] tokens, scaled for others."""
    import torch

    inv_freq = theirs.config.rope_theta ** -(torch.arange(len(factors)) / len(factors))
    at = torch.arange(ids.shape[1])[None, :, None]
    angles = torch.where(
        at < torch.tensor(plain)[:, None, None], at * inv_freq, at * inv_freq / torch.tensor(factors)
    )
    theirs.model.model.rotary_emb.forward = lambda x, position_ids: (
        angles.repeat(1, 1, 2).cos(),
        angles.repeat(1, 1, 2).sin(),
    )
    with torch.no_grad():
        return theirs.model(torch.tensor(ids), use_cache=False).logits


def test_frequencies_of_each_position_match_transformers(tmp_path):
    """The first tokens have plain rope, the others scaled rope."""
    ours, theirs = pair("causal", small_vocabulary_config(), tmp_path)
    ids = random_ids(ours.config, np.ones((2, LENGTH), np.int64))
    plain = ours.config.rope_base.inv_freq()
    kept = np.array([3, 0])
    scaled = np.arange(LENGTH)[None] >= kept[:, None]  # [B, T]
    inv_freq = np.where(scaled[..., None], plain / np.array(LONG, np.float32), plain)
    out = run(ours, input_ids=ids, inv_freq=inv_freq)
    assert distance(out.logits, logits_with_angles(theirs, ids, kept, LONG)) <= TOLERANCE
    for_all = run(ours, input_ids=ids, inv_freq=inv_freq[:, -1])
    assert distance(out.logits[0], for_all.logits[0]) > 1e-3
    assert distance(out.logits[1], for_all.logits[1]) <= TOLERANCE


def test_equal_lists_need_no_recomputation():
    config = small_vocabulary_config(**longrope(ORIGINAL, short_factor=LONG))
    assert not needs_recomputation(config, jnp.array([5]), jnp.array([20])).any()
    config = small_vocabulary_config(**longrope(ORIGINAL, short_factor=LONG, long_mscale=1.5))
    assert needs_recomputation(config, jnp.array([5]), jnp.array([20])).all()


def test_new_frequencies_cause_no_compilation():
    model = Phi3ForCausalLM(small_vocabulary_config(num_hidden_layers=1))
    ids = np.arange(5, 13)[None]
    traces = 0

    @jax.jit
    def forward(model, inv_freq, attention_scaling):
        nonlocal traces
        traces += 1
        return model(ids, inv_freq=inv_freq, attention_scaling=attention_scaling).logits

    own, _ = model.config.rope_scaling.frequencies(model.config.rope_base, jnp.array([8]))
    results = [forward(model, own / factor, 1.0 + factor / 10) for factor in (1.0, 2.0, 3.0)]
    assert traces == 1
    assert not np.allclose(results[0], results[1])


@pytest.mark.parametrize("shape", [(5,), (12,), (2, 7), (1, 2, 6), ()])
def test_rejects_frequencies_of_the_wrong_shape(shape):
    model = Phi3ForCausalLM(small_vocabulary_config(num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"inv_freq has shape .*; expected \[6\], \[2, 6\] or \[2, 2, 6\], half of the 12"
    ):
        model(np.array([[5, 6], [7, 8]]), inv_freq=np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inv_freq", np.ones((3, 6), np.float32), r"inv_freq has shape \(3, 6\); expected \[6\], \[2, 6\]"),
        (
            "attention_scaling",
            np.ones(3, np.float32),
            r"attention_scaling has shape \(3,\); expected .* \[2\]",
        ),
        ("rope_length", np.ones(3, np.int32), r"rope_length has shape \(3,\); expected .* \[2\]"),
    ],
)
def test_rejects_arguments_with_another_number_of_rows(name, value, message):
    model = Phi3ForCausalLM(small_vocabulary_config(num_hidden_layers=1))
    with pytest.raises(ValueError, match=message):
        model(np.array([[5, 6], [7, 8]]), **{name: value})


# Types that transformers rejects for Phi-3


LLAMA_TYPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0, "beta_slow": 1.0},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
}


@stored(whole=True)
def logits_with_type(theirs, ids, entry):
    """Returns the reference's logits with its frequencies of a Llama that has this rope entry."""
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inside = {"original_max_position_embeddings": 16, "rope_theta": theirs.config.rope_theta} | entry
    llama = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=4, max_position_embeddings=16, rope_parameters=inside
    )
    formula = ROPE_INIT_FUNCTIONS[entry["rope_type"]]
    inv_freq, scaling = formula(llama, torch.device("cpu"), seq_len=ids.shape[1])
    theirs.model.model.rotary_emb.inv_freq = inv_freq
    theirs.model.model.rotary_emb.attention_scaling = scaling
    with torch.no_grad():
        return theirs.model(torch.tensor(ids), use_cache=False).logits


@pytest.mark.parametrize("case", LLAMA_TYPES)
def test_types_of_llama_match_transformers(case, tmp_path):
    entry = LLAMA_TYPES[case]
    sizes = {"max_position_embeddings": 16, "original_max_position_embeddings": 16}
    plain, theirs = pair("causal", small_vocabulary_config(**sizes), tmp_path)
    config = small_vocabulary_config(**sizes, rope_scaling=entry)
    ours = Phi3ForCausalLM.from_pretrained(tmp_path, config=config)
    ids = random_ids(config, np.ones((2, LENGTH), np.int64))
    ref = logits_with_type(theirs, ids, entry)
    assert distance(run(ours, input_ids=ids).logits, ref) <= TOLERANCE
    assert distance(run(plain, input_ids=ids).logits, ref) > 1e-3, "the type changes nothing here"


def test_dynamic_rope_has_a_base_for_each_row():
    config = small_vocabulary_config(
        max_position_embeddings=16,
        original_max_position_embeddings=16,
        rope_scaling={"rope_type": "dynamic", "factor": 2.5},
    )
    model = Phi3ForCausalLM(config)
    mask = mask_of_lengths([LENGTH, 10], "right")
    ids = random_ids(config, mask)
    together = run(model, input_ids=ids, attention_mask=mask).logits
    short = run(model, input_ids=ids[1:, :10]).logits
    assert distance(together[1:, :10], short) <= TOLERANCE


def test_early_yarn_is_longrope_with_the_factor_of_yarn(tmp_path):
    """Early configs say "yarn" for longrope's lists with YaRN's attention factor, 0.1 ln s + 1."""
    stretch = 64 / ORIGINAL
    equivalent = longrope(ORIGINAL, attention_factor=round(0.1 * math.log(stretch) + 1, 9))
    _, theirs = pair("causal", small_vocabulary_config(**equivalent), tmp_path)
    early = small_vocabulary_config(**longrope(ORIGINAL, type="yarn"))
    ours = Phi3ForCausalLM.from_pretrained(tmp_path, config=early)
    for length in (ORIGINAL, LENGTH):
        mask = np.ones((1, length), np.int64)
        ids = random_ids(ours.config, mask)
        assert distance(run(ours, input_ids=ids).logits, alone(theirs, ids, mask)) <= TOLERANCE
