"""Every rope formula matches transformers' `ROPE_INIT_FUNCTIONS`; rope entries are read, written, checked."""

import json
import logging
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored

from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import ROPE_TYPES, RopeBase, rope_type

HEAD_DIM = 32
MAX, ORIGINAL = 2048, 256


def factors(start, step, count=HEAD_DIM // 2):
    """Returns increasing factors, as in the published lists."""
    return [start + step * i * i for i in range(count)]


LISTS = {"short_factor": factors(1.0, 0.013), "long_factor": factors(1.08, 0.21)}


def base_of(head_dim=HEAD_DIM, theta=10000.0, partial=1.0, maximum=MAX, original=ORIGINAL):
    return RopeBase(int(head_dim * partial), theta, maximum, original)


@stored
def reference(entry, lengths, head_dim=HEAD_DIM, theta=10000.0, partial=1.0, maximum=MAX, original=ORIGINAL):
    """Returns transformers' inverse frequencies and attention factor for each of the lengths."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**entry, "rope_theta": theta, "partial_rotary_factor": partial}
    if entry["rope_type"] in ("llama3", "yarn", "longrope"):
        parameters.setdefault("original_max_position_embeddings", original)
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=maximum,
        rope_parameters=parameters,
    )
    formula = ROPE_INIT_FUNCTIONS[entry["rope_type"]]
    answers = [formula(config, device=torch.device("cpu"), seq_len=length) for length in lengths]
    return [(inv_freq, float(attention_factor)) for inv_freq, attention_factor in answers]


def row(frequencies):
    """Returns the frequencies and the attention factor of the only row."""
    inv_freq, attention_factor = frequencies
    assert inv_freq.dtype == np.float32
    return np.atleast_2d(inv_freq)[0], float(np.ravel(attention_factor)[0])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0}
ENTRIES = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3-own-original": {**LLAMA3, "original_max_position_embeddings": 512},
    "yarn": YARN,
    "yarn-factor-from-window": {"rope_type": "yarn", "factor": None},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": {**YARN, "mscale": 0.707},
    "yarn-mscale-zero": {**YARN, "mscale": 0.707, "mscale_all_dim": 0},
    "yarn-betas": {**YARN, "beta_fast": 12.5, "beta_slow": 2},
    "yarn-low-equals-high": {**YARN, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    "yarn-untruncated": {**YARN, "truncate": False},
    "yarn-own-original": {**YARN, "original_max_position_embeddings": 1024},
    "longrope": {"rope_type": "longrope", **LISTS},
    "longrope-factor": {"rope_type": "longrope", **LISTS, "factor": 16.0},
    "longrope-attention-factor": {"rope_type": "longrope", **LISTS, "attention_factor": 1.3},
}


LENGTHS = [1, ORIGINAL, ORIGINAL + 1, MAX, MAX + 1, 5 * MAX]


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("name", ENTRIES)
def test_matches_transformers(name, seq_len):
    entry = ENTRIES[name]
    scaling = RopeScaling.from_dict(entry)
    scaling.validate(base_of())
    inv_freq, attention_factor = row(scaling.frequencies(base_of(), jnp.array([seq_len])))
    expected, expected_attention = reference(entry, LENGTHS)[LENGTHS.index(seq_len)]
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    assert attention_factor == pytest.approx(expected_attention, rel=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        {"partial": 0.5, "head_dim": 64},
        {"theta": 250000.0},
        {"theta": 10.0, "original": 1024, "maximum": 8192},
        {"maximum": 128},
    ],
)
@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_matches_transformers_at_other_sizes(name, sizes):
    """Tests partial rotation, a large theta and a small one, and a window below the original one."""
    entry = ENTRIES[name]
    frequencies = RopeScaling.from_dict(entry).frequencies(base_of(**sizes), jnp.array([5 * MAX]))
    inv_freq, attention_factor = row(frequencies)
    ((expected, expected_attention),) = reference(entry, [5 * MAX], **sizes)
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    assert attention_factor == pytest.approx(expected_attention, rel=1e-6)


def test_plain_rope_is_the_textbook_formula():
    inv_freq, attention_factor = row(RopeScaling().frequencies(base_of(), jnp.array([7])))
    expected = [10000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    assert attention_factor == 1.0


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_each_row_depends_on_its_own_length(name):
    """Under jit, a row of a batch has the same frequencies as the row alone."""
    scaling, base = RopeScaling.from_dict(ENTRIES[name]), base_of()
    lengths = jnp.array([3, ORIGINAL, ORIGINAL + 1, 3 * MAX])
    inv_freq, attention_factor = jax.jit(lambda n: scaling.frequencies(base, n))(lengths)
    assert inv_freq.shape == (4, HEAD_DIM // 2)
    for i, length in enumerate(lengths.tolist()):
        alone, alone_attention = row(scaling.frequencies(base, jnp.array([length])))
        np.testing.assert_allclose(inv_freq[i], alone, rtol=1e-6)
        assert float(attention_factor) == pytest.approx(alone_attention)
    assert not np.allclose(inv_freq[0], inv_freq[3], rtol=1e-2)


@pytest.mark.parametrize(
    ("keys", "short", "long"),
    [
        ({"short_mscale": 1.1, "long_mscale": 1.4}, 1.1, 1.4),
        ({"long_mscale": 1.4}, math.sqrt(1 + math.log(8) / math.log(256)), 1.4),
        ({"long_mscale": 1.4, "factor": 16.0}, math.sqrt(1 + math.log(16) / math.log(256)), 1.4),
        ({"short_mscale": 1.1, "long_mscale": 1.4, "attention_factor": 1.25}, 1.25, 1.25),
    ],
)
def test_longrope_attention_factor_depends_on_the_list(keys, short, long):
    scaling = RopeScaling.from_dict({"type": "longrope", **LISTS, **keys})
    scaling.validate(base_of())
    _, attention_factor = scaling.frequencies(base_of(), jnp.array([ORIGINAL, ORIGINAL + 1]))
    np.testing.assert_allclose(np.broadcast_to(attention_factor, 2), [short, long], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "original", "expected"),
    [("longrope", 4096, 1.1902380714), ("longrope", 8192, 1.1435437498), ("yarn", 4096, 1.3465735903)],
)
def test_matches_published_attention_factors(name, original, expected):
    base = base_of(maximum=131072, original=original)
    _, attention_factor = RopeScaling.from_dict({"type": name, **LISTS}).frequencies(base, jnp.array([1]))
    assert attention_factor == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("member", ["Phi-3.5-mini-instruct", "Phi-3-vision-128k-instruct"])
def test_matches_published_inverse_frequencies(member, shared_data):
    published = json.loads(shared_data("phi3-longrope", "longrope_factors.json").read_text())[member]
    base = RopeBase(published["head_dim"], published["rope_theta"], 131072, 4096)
    entry = {"type": "su", **{key: published[key] for key in ("short_factor", "long_factor")}}
    inv_freq, attention_factor = RopeScaling.from_dict(entry).frequencies(base, jnp.array([4096, 4097]))
    np.testing.assert_allclose(inv_freq[0], published["hf_5_23_inv_freq_short"], rtol=1e-6)
    np.testing.assert_allclose(inv_freq[1], published["hf_5_23_inv_freq_long"], rtol=1e-6)
    assert attention_factor == pytest.approx(published["hf_5_23_attention_factor"])


def test_early_yarn_has_longrope_frequencies():
    lengths = jnp.array([ORIGINAL, ORIGINAL + 1])
    early, _ = RopeScaling.from_dict({"type": "yarn", **LISTS}).frequencies(base_of(), lengths)
    late, _ = RopeScaling.from_dict({"type": "longrope", **LISTS}).frequencies(base_of(), lengths)
    np.testing.assert_array_equal(early, late)


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (None, "default"),
        ({}, "default"),
        ({"rope_type": None}, "default"),
        ({"type": "default"}, "default"),
        ({"rope_type": "linear", "factor": 2.0}, "linear"),
        ({"type": "su", **LISTS}, "longrope"),
        ({"type": "su", "rope_type": "longrope", **LISTS}, "longrope"),
        ({"type": "yarn", **LISTS}, "phi3-yarn"),
        ({"type": "yarn", "factor": 4.0}, "yarn"),
    ],
)
def test_reads_every_spelling(entry, name, caplog):
    assert RopeScaling.from_dict(entry).rope_type == name
    assert not caplog.records


def test_rope_type_wins_over_the_type_of_an_early_phi3(caplog):
    """transformers 5 keeps the old `type` beside `rope_type`, which it uses."""
    entry = {"type": "yarn", "rope_type": "longrope", **LISTS}
    assert RopeScaling.from_dict(entry).rope_type == "longrope"
    assert "rope_type='longrope' is used, not type='yarn'" in caplog.text


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_survive_a_round_trip(name):
    scaling = RopeScaling.from_dict(ENTRIES[name])
    assert RopeScaling.from_dict(json.loads(json.dumps(scaling.to_dict(base_of())))) == scaling
    assert pickle.loads(pickle.dumps(scaling)) == scaling
    assert hash(scaling) == hash(RopeScaling.from_dict(ENTRIES[name]))


def test_writes_entries_for_transformers():
    su = RopeScaling.from_dict({"type": "su", **LISTS})
    assert su.to_dict(base_of()) == {"type": "longrope", **LISTS}
    early = RopeScaling.from_dict({"type": "yarn", **LISTS})
    attention_factor = 0.1 * math.log(MAX / ORIGINAL) + 1
    assert early.to_dict(base_of()) == {"type": "longrope", **LISTS, "attention_factor": attention_factor}
    assert RopeScaling().to_dict(base_of()) is None


def test_keeps_unknown_keys_with_a_warning(caplog):
    entry = {"rope_type": "linear", "factor": 2.0, "finetuned": True}
    with caplog.at_level(logging.WARNING):
        scaling = RopeScaling.from_dict(entry)
    assert "rope type 'linear' has no use for finetuned" in caplog.text
    scaling.validate(base_of())
    scaling.frequencies(base_of(), jnp.array([1]))
    assert scaling.to_dict(base_of()) == entry


LONG = {"type": "longrope", **LISTS}
INVALID = {
    "unknown type": (
        {"type": "ntk"},
        r"rope type 'ntk' is unknown; use one of default, dynamic, .*yarn, or su",
    ),
    "missing": ({"type": "linear"}, "rope type 'linear' needs factor in rope_scaling, which has no keys"),
    "null": ({"type": "linear", "factor": None}, "needs factor"),
    "one list": (
        {"type": "su", "short_factor": [1.0]},
        "needs long_factor in rope_scaling, which has short_f",
    ),
    "below one": (
        {"type": "dynamic", "factor": 0.5},
        r"rope_scaling\['factor'\]=0.5 must be a number, 1 or more",
    ),
    "text": ({"type": "linear", "factor": "2"}, r"\['factor'\]='2' must be a number"),
    "bool": ({"type": "linear", "factor": True}, r"\['factor'\]=True must be a number"),
    "infinite": ({"type": "linear", "factor": math.inf}, r"\['factor'\]=inf must be a number"),
    "length": (
        {**LONG, "short_factor": [1.0] * 48},
        r"\['short_factor'\] has 48 entries; give 16, .* 32 dims",
    ),
    "no list": ({**LONG, "long_factor": 2.0}, r"\['long_factor'\]=2.0 must be a list of 16 positive numbers"),
    "zero": (
        {**LONG, "long_factor": [1.0, 0.0] * 8},
        r"\['long_factor'\]\[1\]=0.0 must be a positive number",
    ),
    "no number": (
        {**LONG, "long_factor": [1.0] * 15 + ["x"]},
        r"\['long_factor'\]\[15\]='x' must be a positive",
    ),
    "mscale": ({**LONG, "short_mscale": -1}, r"\['short_mscale'\]=-1 must be a positive number"),
    "truncate": ({**YARN, "truncate": 1}, r"\['truncate'\]=1 must be true or false"),
    "original": ({**YARN, "original_max_position_embeddings": 0}, "=0 must be a positive integer"),
    "betas": ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_fast=1 must not be below beta_slow=32"),
    "bands": ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
    "two types": (
        {"type": "linear", "rope_type": "yarn", "factor": 2.0},
        "type='linear' contradicts rope_type='yarn'; give one of them",
    ),
    "plain and another": (
        {"type": "default", "rope_type": "linear", "factor": 2.0},
        "type='default' contradicts rope_type='linear'",
    ),
    "no type": ({"factor": 2.0}, "rope_scaling has factor, but no rope_type, which says what they mean"),
    "type of another kind": ({"rope_type": ["linear"]}, r"\['rope_type'\]=\['linear'\] must be the name"),
    "infinite in float32": ({**LONG, "factor": 1e300}, r"\['factor'\]=1e\+300 must be"),
    "zero in float32": (
        {**LONG, "short_mscale": 1e-50},
        r"\['short_mscale'\]=1e-50 must be a positive number",
    ),
    "no float": ({"type": "linear", "factor": 10**400}, r"\['factor'\]=1000"),
    "nested": (
        {"full_attention": {"rope_type": "default"}},
        r"\['full_attention'\] is a mapping; Phi-3 has one",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_rejects_invalid_entries(case):
    entry, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        RopeScaling.from_dict(entry).validate(base_of())


def test_dynamic_needs_more_than_two_dims():
    with pytest.raises(ValueError, match="needs 4 or more rotary dims, not 2"):
        RopeScaling.from_dict(ENTRIES["dynamic"]).validate(base_of(head_dim=2))


def test_registers_a_new_type_with_one_function():
    def halved(base, seq_len, *, divisor):
        return base.inv_freq() / divisor, 1.0

    rope_type("test-halved")(halved)
    try:
        scaling = RopeScaling.from_dict({"rope_type": "test-halved", "divisor": 2})
        scaling.validate(base_of())
        assert scaling.frequencies(base_of(), jnp.array([1]))[0][0] == 0.5
        with pytest.raises(ValueError, match="needs divisor"):
            RopeScaling("test-halved").validate(base_of())
    finally:
        del ROPE_TYPES["test-halved"]


BAD_FORMULAS = {
    "not a number": (lambda base, seq_len: (base.inv_freq() * np.nan, 1.0), "for rows of 1 tokens"),
    "infinite when long": (
        lambda base, seq_len: (base.inv_freq() / jnp.maximum(100 - seq_len, 0)[:, None], 1.0),
        "not finite in float32 for rows of 100 tokens",
    ),
    "infinite factor": (
        lambda base, seq_len: (base.inv_freq(), jnp.exp(8.0 * seq_len)),
        "of 64 tok",
    ),
    "beyond float32": (lambda base, seq_len: (base.inv_freq(), 1e39), "not finite in float32 for rows of 1 "),
    "too few": (lambda base, seq_len: (base.inv_freq()[1:], 1.0), r"expected \[4\] or \[4, 4\]"),
}


@pytest.mark.parametrize("case", BAD_FORMULAS)
def test_rejects_a_type_whose_numbers_are_not_finite(case):
    formula, message = BAD_FORMULAS[case]
    rope_type("test-bad")(formula)
    try:
        scaling = RopeScaling("test-bad")
        with pytest.raises(ValueError, match=message):
            scaling.check_formula(base_of(head_dim=8, maximum=100, original=64))
    finally:
        del ROPE_TYPES["test-bad"]
