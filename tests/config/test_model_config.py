"""`Phi3Config` matches transformers' class and the family's published `config.json` files."""

import json
import logging
import os
import pickle
from copy import deepcopy

import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_scaling import RopeScaling

PUBLISHED = {
    "phi-3-mini-4k-instruct": "phi-3-mini-4k-instruct",
    "phi-3-mini-4k-instruct-first": "phi-3-mini-4k-instruct",
    "phi-3-mini-128k-instruct": "phi-3-mini-128k-instruct",
    "phi-3-mini-128k-instruct-first": "phi-3-mini-128k-instruct-april-2024",
    "phi-3-medium-4k-instruct": "phi-3-medium-4k-instruct",
    "phi-3-medium-128k-instruct": "phi-3-medium-128k-instruct",
    "phi-3.5-mini-instruct": "phi-3.5-mini-instruct",
    "phi-4": "phi-4",
    "phi-4-mini-instruct": "phi-4-mini-instruct",
    "phi-4-mini-reasoning": "phi-4-mini-reasoning",
}
SIZES = {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
SMALL = {**SIZES, "eos_token_id": 2, "pad_token_id": 3}
SHORT = [1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.9, 2.6]
LONG = [1.1, 1.3, 1.9, 3.2, 6.1, 11.9, 24.0, 47.7]
LISTS = {"short_factor": SHORT, "long_factor": LONG}
LENGTHS = (4096, 4097)
WINDOWS = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
ENTRIES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "su": {"type": "su", **LISTS},
    "longrope": {"rope_type": "longrope", **LISTS, "attention_factor": 1.2},
}


def small(**changes):
    return Phi3Config(**(SMALL | changes))


def ours(config, seq_len):
    inv_freq, attention_factor = config.rope_scaling.frequencies(config.rope_base, jnp.array([seq_len]))
    return np.atleast_2d(inv_freq)[0], float(attention_factor)


@stored
def config_of_theirs(settings):
    """Returns the config that transformers keeps, and the one that it saves."""
    import transformers

    config = transformers.Phi3Config.from_dict(deepcopy(settings))  # from_dict changes it
    everything = json.loads(config.to_json_string(use_diff=False))
    saved = json.loads(config.to_json_string())
    return {"kept": everything | {"num_labels": config.num_labels}, "saved": saved}


@stored(whole=True)
def ropes_of_theirs(settings):
    """Returns transformers' inverse frequencies and attention factor on both sides of longrope's switch."""
    import transformers

    config = transformers.Phi3Config.from_dict(deepcopy(settings))  # from_dict changes it
    return [rope(config, length) for length in LENGTHS]


def rope(config, seq_len):
    """Returns transformers' inverse frequencies and attention factor."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    if config.rope_parameters["rope_type"] == "default":
        rotary = Phi3RotaryEmbedding(config)
        return rotary.inv_freq, rotary.attention_scaling
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](
        config, device=torch.device("cpu"), seq_len=seq_len
    )


def assert_same_rope(config, ropes):
    for seq_len, (expected, expected_attention) in zip(LENGTHS, ropes, strict=True):
        inv_freq, attention_factor = ours(config, seq_len)
        np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
        assert attention_factor == pytest.approx(expected_attention, rel=1e-7)


@pytest.mark.parametrize("member", PUBLISHED)
def test_reads_published_configs(member, shared_data, caplog):
    path = shared_data("phi3-configs", member, "config.json")
    raw = json.loads(path.read_text())
    config = Phi3Config.from_pretrained(path.parent)
    assert not caplog.records
    for name in raw.keys() - {"rope_scaling", "model_type", "use_cache"}:
        assert getattr(config, name, config.extra.get(name)) == raw[name], name
    for key in ("short_factor", "long_factor"):
        assert dict(config.rope_scaling.parameters).get(key) == (
            tuple((raw["rope_scaling"] or {}).get(key, ())) or None
        )
    assert Phi3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert_same_rope(config, ropes_of_theirs(config.to_dict()))


@pytest.mark.parametrize("member", PUBLISHED)
def test_presets_match_published_configs(member, shared_data):
    config = Phi3Config.from_pretrained(shared_data("phi3-configs", member, "config.json"))
    preset = Phi3Config.preset(PUBLISHED[member])
    assert {preset.extra.get("torch_dtype"), config.extra.get("torch_dtype")} == {"bfloat16"}
    assert preset.replace(extra={}) == config.replace(extra={})


def test_presets_are_complete():
    assert set(Phi3Config.presets()) == {
        *PUBLISHED.values(),
        "phi-3-small-8k-instruct",
        "smollm2-135m-instruct",
    }
    config = Phi3Config.preset("smollm2-135m-instruct")
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (64, 3, 100000.0)
    with pytest.raises(
        ValueError, match=r"no preset is called 'microsoft/Phi-4-mini'; did you mean 'phi-4-mini-"
    ):
        Phi3Config.preset("microsoft/Phi-4-mini")


def test_defaults_match_transformers():
    config, reference = Phi3Config().to_dict(), config_of_theirs({})["kept"]
    for name in config.keys() - {"rope_theta", "rope_scaling", "partial_rotary_factor"}:
        assert config[name] == reference[name], name
    assert Phi3Config().rope_parameters == reference["rope_parameters"]
    assert Phi3Config.from_dict({}) == Phi3Config.from_dict({"model_type": "phi3"}) == Phi3Config()


def test_derived_properties():
    config = small(num_attention_heads=8, num_key_value_heads=2, head_dim=32, partial_rotary_factor=0.75)
    assert config.rotary_dim == config.rope_base.dim == 24
    assert small(eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert small(eos_token_id=7).eos_token_ids == (7,)
    assert small(eos_token_id=None).eos_token_ids == ()
    assert small(id2label={"1": "no", "0": "yes"}).label2id == {"yes": 0, "no": 1}


EVERYTHING = {
    "num_key_value_heads": 2,
    "head_dim": 24,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.2,
    "attention_dropout": 0.3,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-6,
    "use_cache": False,
    "tie_word_embeddings": True,
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "bos_token_id": 5,
    "eos_token_id": [7, 8],
    "pad_token_id": None,
    "sliding_window": 31,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "problem_type": "multi_label_classification",
    "classifier_dropout": 0.4,
    "hidden_dropout": 0.5,
}


def test_every_field_survives_a_round_trip_through_transformers(tmp_path):
    config = Phi3Config.from_dict(
        {**SIZES, "intermediate_size": 48, **EVERYTHING, "architectures": ["Phi3Model"]}
    )
    assert Phi3Config.from_pretrained(config.save_pretrained(tmp_path)) == config
    theirs = config_of_theirs(json.loads((tmp_path / "config.json").read_text()))
    reference = theirs["kept"]
    for name, value in (SIZES | EVERYTHING | {"num_labels": 3, "architectures": ["Phi3Model"]}).items():
        if name in ("rope_theta", "partial_rotary_factor"):
            assert reference["rope_parameters"][name] == getattr(config, name) == value
        else:
            assert reference[name] == value, name
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    (tmp_path / "config.json").write_text(json.dumps(theirs["saved"]))
    again = Phi3Config.from_pretrained(tmp_path)
    assert again.replace(extra={}) == config.replace(extra={})


@pytest.mark.parametrize("name", ENTRIES)
def test_every_rope_type_survives_a_round_trip(name):
    config = small(rope_scaling=ENTRIES[name], max_position_embeddings=8192)
    assert Phi3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert small(rope_parameters=config.rope_parameters, max_position_embeddings=8192) == config


@pytest.mark.parametrize("spelling", ["su", "longrope", "yarn"])
def test_transformers_reads_every_spelling_of_longrope(spelling):
    """It refuses "su" itself, and would replace the attention factor of early "yarn"."""
    config = small(**WINDOWS, rope_scaling={"type": spelling, **LISTS})
    theirs, ropes = config_of_theirs(config.to_dict())["kept"], ropes_of_theirs(config.to_dict())
    assert_same_rope(config, ropes)
    expected = 1.3465735903 if spelling == "yarn" else 1.1902380714
    assert ropes[0][1] == pytest.approx(expected, rel=1e-9)
    assert_same_rope(Phi3Config.from_dict(theirs), ropes)
    legacy = config.to_dict()["rope_scaling"]
    assert "rope_type" not in legacy
    assert len(legacy) == (4 if spelling == "yarn" else 3)  # transformers 4 takes these three keys, no others


def test_reads_transformers_5_config(caplog):
    settings = {
        **SMALL,
        **WINDOWS,
        "num_labels": 3,
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "longrope",
            **{key: values[:4] for key, values in LISTS.items()},
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    theirs = config_of_theirs(settings)["kept"]
    config = Phi3Config.from_dict({k: v for k, v in theirs.items() if k != "num_labels"})
    assert not [record for record in caplog.records if record.name.startswith("phi3_jax")]
    assert (config.rope_theta, config.partial_rotary_factor, config.num_labels) == (5000.0, 0.5, 3)
    assert config.extra["dtype"] == "bfloat16"
    assert config.rope_parameters == theirs["rope_parameters"]
    assert_same_rope(config, ropes_of_theirs(settings))


def test_reads_original_length_from_the_rope_entry():
    entry = {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 8192}
    config = small(max_position_embeddings=131072, rope_parameters=entry)
    assert config.original_max_position_embeddings == 8192
    assert ours(config, 1)[1] == pytest.approx(1.1435437498)
    assert small(max_position_embeddings=131072).original_max_position_embeddings == 4096


def test_accepts_both_spellings_that_agree():
    entry = {"type": "su", **LISTS}
    both = small(rope_scaling=entry, rope_parameters={**entry, "rope_theta": 5.0}, rope_theta=5)
    assert both == small(rope_scaling=entry, rope_theta=5.0)
    assert small(rope_scaling=RopeScaling.from_dict(entry)) == small(rope_scaling=entry)
    own = RopeScaling.from_dict(ENTRIES["yarn"])
    assert small(rope_scaling=own) == small(rope_scaling=ENTRIES["yarn"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_label_count_without_names_survives_a_round_trip(count):
    config = small(num_labels=count)
    assert Phi3Config.from_dict(config.to_dict()) == config
    assert config_of_theirs(config.to_dict())["kept"]["num_labels"] == count


def test_reads_labels_from_label2id_alone(caplog):
    assert Phi3Config.from_dict({"label2id": {"b": 1, "a": 0}}).id2label == {0: "a", 1: "b"}
    with caplog.at_level(logging.WARNING):
        Phi3Config.from_dict({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}})
    assert "is not the inverse of id2label" in caplog.text


def test_keeps_copies_of_unknown_keys():
    raw = {**SMALL, "auto_map": {"AutoConfig": "x.Y"}, "quantised": [1, 2]}
    config = Phi3Config.from_dict(raw)
    raw["auto_map"]["AutoConfig"] = "changed"
    assert config.to_dict()["auto_map"] == {"AutoConfig": "x.Y"}
    config.to_dict()["quantised"].append(3)
    assert config.extra["quantised"] == [1, 2]


def test_use_cache_survives_a_round_trip():
    assert Phi3Config().to_dict()["use_cache"] is True
    assert Phi3Config.from_dict({"use_cache": True}) == Phi3Config()
    assert Phi3Config.from_dict({"use_cache": False}).to_dict()["use_cache"] is False


def test_equal_configs_have_equal_hashes():
    config = Phi3Config.preset("phi-4-mini-instruct")
    again = Phi3Config.from_dict(config.to_dict())
    assert config == again
    assert hash(config) == hash(again)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config != config.replace(rope_theta=1e5)
    assert {config: 1}[again] == 1
    assert hash(small(eos_token_id=[7, 8], id2label={0: "x"})) == hash(
        small(eos_token_id=(7, 8), id2label={0: "x"})
    )


def test_replace_derives_fields_again():
    config = small().replace(num_attention_heads=2)
    assert (config.num_key_value_heads, config.head_dim) == (2, 32)
    given = small(num_key_value_heads=2, head_dim=24).replace(num_attention_heads=8)
    assert (given.num_key_value_heads, given.head_dim) == (2, 24)
    assert small().replace(num_labels=3).id2label[2] == "LABEL_2"
    assert small(id2label={0: "x"}).replace(id2label={0: "x", 1: "y"}).num_labels == 2
    with pytest.raises(ValueError, match="num_labels=3 contradicts id2label"):
        small(id2label={0: "x"}).replace(num_labels=3)
    with pytest.raises(TypeError, match="colour"):
        small().replace(colour=1)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_replace_keeps_fields_beside_the_rope_entry(spelling):
    config = small(rope_theta=500.0, partial_rotary_factor=0.5, rope_scaling=ENTRIES["linear"])
    assert config.replace(rope_theta=7.0).rope_parameters["rope_theta"] == 7.0
    assert config.replace(rope_theta=7.0).rope_scaling == config.rope_scaling
    changed = config.replace(**{spelling: ENTRIES["yarn"]})
    assert changed.rope_scaling.rope_type == "yarn"
    assert (changed.rope_theta, changed.original_max_position_embeddings) == (500.0, 1024)
    assert config.replace(**{spelling: {"rope_theta": 9.0}}) == small(
        rope_theta=9.0, partial_rotary_factor=0.5
    )
    assert config.replace(**{spelling: None}).rope_scaling == RopeScaling()


INVALID = {
    "size": ({"hidden_size": 0}, "hidden_size=0 must be a positive integer"),
    "size type": ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be a positive integer"),
    "size bool": ({"intermediate_size": True}, "intermediate_size=True must be a positive integer"),
    "size null": ({"vocab_size": None}, "vocab_size=None must be a positive integer"),
    "head_dim": ({"head_dim": -8}, "head_dim=-8 must be a positive integer"),
    "heads": (
        {"num_attention_heads": 5},
        "hidden_size=64 does not divide over num_attention_heads=5; use a multi",
    ),
    "kv heads": (
        {"num_key_value_heads": 3},
        "num_key_value_heads=3 does not divide num_att.*=4; use 1, 2, 4",
    ),
    "kv size": ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a positive integer"),
    "odd rotary": ({"head_dim": 15}, "head_dim=15 times partial_rotary_factor=1.0 makes 15 rotary dims"),
    "no rotary": ({"partial_rotary_factor": 0.05}, "makes 0 rotary dims, which must be even and at least 2"),
    "partial": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 must be above 0 and at most 1"),
    "theta": ({"rope_theta": -1.0}, "rope_theta=-1.0 must be a number above 1"),
    "window": ({"sliding_window": 0}, "sliding_window=0 must be a positive integer, or None for no window"),
    "dropout": ({"resid_pdrop": 1.0}, "resid_pdrop=1.0 must be a rate from 0"),
    "dropout null": ({"attention_dropout": None}, "attention_dropout=None must be a rate"),
    "head dropout": ({"classifier_dropout": -0.1}, "classifier_dropout=-0.1 must be a rate .* or None"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be a positive number"),
    "eps text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a positive number"),
    "eps zero in float32": (
        {"rms_norm_eps": 1e-50},
        "rms_norm_eps=1e-50 must be a positive number of float32",
    ),
    "theta infinite in float32": ({"rope_theta": 1e300}, r"rope_theta=1e\+300 must be a number above 1"),
    "size of 2**31": (
        {"num_hidden_layers": 2**31},
        "num_hidden_layers=2147483648 must be a positive .* below",
    ),
    "too many labels": (
        {"num_labels": 10**10},
        "num_labels=10000000000 must be a positive .* most 1,048,576",
    ),
    "tie": ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
    "label list": ({"id2label": ["a", "b"]}, r"id2label=\['a', 'b'\] must map 0, 1, 2, ... to names"),
    "label key": ({"id2label": {"zero": "a"}}, "id2label={'zero': 'a'} must map 0, 1, 2"),
    "label null": ({"id2label": {"0": None}}, "id2label={'0': None} must map"),
    "range": ({"initializer_range": -0.1}, "initializer_range=-0.1 must be a number, 0 or more"),
    "original": (
        {"original_max_position_embeddings": 0},
        "original_max_position_embeddings=0 must be a positive",
    ),
    "problem": (
        {"problem_type": "ranking"},
        "problem_type='ranking' must be one of regression, single_label_c",
    ),
    "one label": (
        {"problem_type": "single_label_classification", "num_labels": 1},
        "needs more than num_labels=1",
    ),
    "labels": ({"num_labels": 0}, "num_labels=0 must be a positive integer"),
    "label gap": ({"id2label": {0: "a", 2: "b"}}, r"id2label has the keys \[0, 2\]; use 0, 1, 2"),
    "label count": (
        {"num_labels": 3, "id2label": {0: "a"}},
        "num_labels=3 contradicts id2label, which names 1",
    ),
    "pad": (
        {"pad_token_id": 99},
        "pad_token_id=99 is outside the vocabulary; with vocab_size=99 use 0 to 98",
    ),
    "negative pad": ({"pad_token_id": -1}, "pad_token_id=-1 is outside .* or None for no such token"),
    "bos": ({"bos_token_id": 100}, "bos_token_id=100 is outside the vocabulary"),
    "eos": ({"eos_token_id": [1, 200]}, "eos_token_id=200 is outside the vocabulary"),
    "eos type": ({"eos_token_id": "2"}, "eos_token_id='2' is outside the vocabulary"),
    "extra": ({"extra": {"vocab_size": 3}}, "extra holds 'vocab_size', which is a field"),
    "rope lists": (
        {"rope_scaling": {"type": "su", **LISTS, "long_factor": [1.0] * 3}},
        "has 3 entries; give 8",
    ),
    "rope type": ({"rope_scaling": "longrope"}, "rope_scaling='longrope' must be a mapping"),
    "two thetas": (
        {"rope_theta": 5, "rope_parameters": {"rope_theta": 10000.0}},
        r"rope_theta=5 contradicts rope_parameters\['rope_theta'\]=10000.0",
    ),
    "two originals": (
        {"original_max_position_embeddings": 4096, "rope_scaling": ENTRIES["yarn"]},
        r"original_max_position_embeddings=4096 contradicts rope_scaling\['original.*'\]=1024; give one",
    ),
    "two entries": (
        {"rope_scaling": ENTRIES["linear"], "rope_parameters": {"rope_type": "default"}},
        "rope_scaling=.*linear.* contradicts rope_parameters=.*default",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_rejects_invalid_values(case):
    changes, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize("model_type", ["phimoe", "phi3_v", "qwen2"])
def test_rejects_other_models(model_type, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        ValueError, match=rf"config\.json: model_type='{model_type}' is not supported; .*'phi3'"
    ):
        Phi3Config.from_pretrained(tmp_path)


def test_rejects_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config at .*config\.json; give a checkpoint"):
        Phi3Config.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config at Phi-3-mini .*neither a folder.*phi-3-mini-4k"):
        Phi3Config.from_pretrained("Phi-3-mini")
    path = tmp_path / "config.json"
    path.write_text('{\n  "vocab_size": 3,\n  oops\n}')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: .* at line 3 column 3"):
        Phi3Config.from_pretrained(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: holds a list"):
        Phi3Config.from_pretrained(path)


def test_failed_saving_leaves_the_old_file(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    path = small().save_pretrained(folder)
    before = path.read_text()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        small(vocab_size=200).save_pretrained(folder)
    assert path.read_text() == before
    assert [file.name for file in folder.iterdir()] == ["config.json"]
