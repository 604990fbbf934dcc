"""`--rope` arguments are read and applied to configs, and transformers computes the same from those."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from reference import LONG, SHORT, longrope, small_config

from phi3_jax import Phi3Config, RopeScaling
from phi3_jax.config.rope_argument import as_longrope, parse_rope, trained_length

TRAINED = 64


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "both.json", {"short_factor": SHORT, "long_factor": LONG, "about": {"seed": 3}})
    write(tmp_path / "long.json", {"long_factor": LONG, "max_position_embeddings": 256})
    write(
        tmp_path / "factors.json",
        {"factors": LONG, "attention_factor": 1.25, "factor": 3, "initial_tokens": 5},
    )
    entry = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 5e4}
    write(tmp_path / "rope.json", entry)
    write(tmp_path / "early.json", {"type": "yarn", "short_factor": SHORT, "long_factor": LONG})
    write(tmp_path / "su.json", {"type": "su", "short_factor": SHORT, "long_factor": LONG})


EXTENDED = longrope() | {"max_position_embeddings": 64}
"""Config changes for a model trained on 16 tokens and extended to 64 by longrope."""

READ = [
    ("none", {}, "default", 64, 64, 64),
    ("linear:factor=4", {}, "linear", 256, 64, 256),
    ("linear:factor=2.5,max_position_embeddings=100", {}, "linear", 100, 64, 100),
    ("dynamic:factor=4", {}, "dynamic", 64, 64, 256),
    ("yarn:factor=4,beta_fast=16", {}, "yarn", 256, 64, 256),
    ("yarn:max_position_embeddings=192", {}, "yarn", 192, 64, 192),
    ("yarn:factor=4,truncate=false,original_max_position_embeddings=32", {}, "yarn", 128, 32, 128),
    ("llama3:factor=8,low_freq_factor=1,high_freq_factor=4", {}, "llama3", 512, 64, 512),
    ("longrope:@both.json,factor=2", {}, "longrope", 128, 64, 128),
    ("longrope:@long.json", {}, "longrope", 256, 64, 256),
    ("longrope:@factors.json", {}, "longrope", 192, 64, 192),
    ("longrope:@su.json,factor=2", {}, "longrope", 128, 64, 128),
    ("@rope.json", {}, "yarn", 64, 32, 64),
    ("@early.json,max_position_embeddings=256", {}, "phi3-yarn", 256, 64, 256),
    ("none", EXTENDED, "default", 16, 16, 16),
    ("linear:factor=2", EXTENDED, "linear", 32, 16, 32),
    ("dynamic:factor=2", EXTENDED, "dynamic", 16, 16, 32),
    ("longrope:@both.json", EXTENDED, "longrope", 64, 16, 64),
    ("yarn", EXTENDED, "yarn", 64, 16, 64),
]
"""Argument, config changes, and the expected type, max, original and context."""


@pytest.mark.parametrize(("text", "changes", "rope_type", "maximum", "original", "context"), READ)
def test_applies_to_a_config(
    text: str, changes: dict[str, Any], rope_type: str, maximum: int, original: int, context: int
) -> None:
    argument = parse_rope(text)
    config = argument.apply(small_config(**changes))
    assert argument.name == text
    assert config.rope_scaling.rope_type == rope_type
    assert config.max_position_embeddings == maximum
    assert config.original_max_position_embeddings == original
    assert config.context_length == context
    assert trained_length(config) == original
    if rope_type != "phi3-yarn":  # which is written as longrope
        assert Phi3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def frequencies(config: Phi3Config, length: int) -> tuple[np.ndarray, float]:
    inv_freq, attention_factor = config.rope_scaling.frequencies(config.rope_base, jnp.array([length]))
    return np.atleast_2d(inv_freq)[0], float(np.ravel(attention_factor)[0])


@stored(whole=True)
def ropes_of_theirs(settings: dict[str, Any], lengths: list[int]) -> list[Any]:
    """Returns inverse frequencies and attention factor of transformers' Phi-3 rope for each length."""
    import torch
    import transformers
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = transformers.Phi3Config.from_dict(settings)
    ropes = []
    for length in lengths:
        rotary = Phi3RotaryEmbedding(config)
        rotary(torch.zeros(1), torch.arange(length)[None])
        ropes.append((rotary.inv_freq, rotary.attention_scaling))
    return ropes


@stored(whole=True)
def ropes_of_llama(settings: dict[str, Any], lengths: list[int]) -> tuple[str, list[Any]]:
    """Returns the type of transformers' Llama rope, and for each length frequencies and attention factor."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig.from_dict(settings | {"model_type": "llama"})
    kind = config.rope_parameters["rope_type"]
    return kind, [ROPE_INIT_FUNCTIONS[kind](config, seq_len=length) for length in lengths]


@pytest.mark.parametrize(("text", "changes"), [case[:2] for case in READ])
def test_matches_transformers_from_the_saved_config(
    text: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Uses its Phi-3 where that takes the type, else Llama's config class, whose rope has all types."""
    config = parse_rope(text).apply(small_config(**changes))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    lengths = [16, 17, 64, 65, 250]
    if config.rope_scaling.rope_type in ("default", "longrope", "phi3-yarn"):
        assert saved["model_type"] == "phi3"
        ropes = ropes_of_theirs(saved, lengths)
    else:
        kind, ropes = ropes_of_llama(saved, lengths)
        assert kind == config.rope_scaling.rope_type
    for length, (expected, expected_attention) in zip(lengths, ropes, strict=True):
        inv_freq, attention_factor = frequencies(config, length)
        np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
        assert attention_factor == pytest.approx(expected_attention, rel=1e-6)


@pytest.mark.parametrize("member", ["Phi-3.5-mini-instruct", "Phi-3-vision-128k-instruct"])
@pytest.mark.parametrize("plain", [True, False])
def test_matches_published_lists(member: str, plain: bool, shared_data: Any, tmp_path: Path) -> None:
    """Tests them on the model that they are for, and on the one of 4,096 tokens."""
    published = json.loads(shared_data("phi3-longrope", "longrope_factors.json").read_text())[member]
    write(tmp_path / "lists.json", {key: published[key] for key in ("short_factor", "long_factor")})
    base = Phi3Config.preset("phi-3-mini-4k-instruct" if plain else "phi-3.5-mini-instruct")
    text = "longrope:@lists.json" + ",max_position_embeddings=131072" * plain
    config = parse_rope(text).apply(base)
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (131072, 4096)
    ropes = ropes_of_theirs(config.to_dict(), [4096, 4097])
    for length, name, theirs in ((4096, "short", ropes[0]), (4097, "long", ropes[1])):
        inv_freq, attention_factor = frequencies(config, length)
        np.testing.assert_allclose(inv_freq, published[f"hf_5_23_inv_freq_{name}"], rtol=1e-6)
        np.testing.assert_allclose(inv_freq, theirs[0], rtol=1e-6)
        assert attention_factor == pytest.approx(theirs[1], rel=1e-6)


def test_plain_rope_keeps_the_config_of_a_plain_model() -> None:
    config = small_config(original_max_position_embeddings=32)
    assert parse_rope("none").apply(config) is config


def test_changes_theta_alone() -> None:
    config = parse_rope("none:rope_theta=500000").apply(small_config())
    assert config.rope_theta == 500000
    assert config.max_position_embeddings == TRAINED


def test_initial_tokens_cannot_be_saved() -> None:
    argument = parse_rope("longrope:@factors.json")
    assert argument.initial_tokens == 5
    with pytest.raises(
        ValueError, match=r"a config cannot express initial_tokens=5; phi3-jax rope and evaluate"
    ):
        argument.config_to_save(small_config())
    plain = parse_rope("linear:factor=4")
    assert plain.config_to_save(small_config()) == plain.apply(small_config())


def test_long_list_alone_keeps_plain_rope_up_to_the_original_length() -> None:
    config = parse_rope("longrope:@long.json").apply(small_config())
    plain, _ = RopeScaling().frequencies(config.rope_base, jnp.array([1]))
    np.testing.assert_allclose(frequencies(config, TRAINED)[0], plain, rtol=1e-6)
    np.testing.assert_allclose(frequencies(config, TRAINED + 1)[0], plain / np.array(LONG), rtol=1e-6)


NTK = """
import numpy as np

from phi3_jax import rope_type


@rope_type("ntk-of-a-file")
def ntk(base, seq_len, *, factor):
    stretch = np.float32(factor) ** (np.arange(0, base.dim, 2, dtype=np.float32) / (base.dim - 2))
    return base.inv_freq() / stretch, 1.0
"""


def test_runs_a_file_that_registers_a_type(tmp_path: Path) -> None:
    write(tmp_path / "ntk.py", NTK)
    config = parse_rope("ntk.py:ntk-of-a-file:factor=4").apply(Phi3Config(max_position_embeddings=TRAINED))
    assert config.context_length == 4 * TRAINED
    inv_freq, attention = config.rope_scaling.frequencies(config.rope_base, jnp.array([TRAINED]))
    plain = config.rope_base.inv_freq()
    assert attention == 1.0
    assert inv_freq[0] == plain[0]
    np.testing.assert_allclose(np.asarray(inv_freq)[-1], plain[-1] / 4, rtol=1e-6)
    transformed = as_longrope(config).rope_parameters
    np.testing.assert_allclose(transformed["long_factor"][-1], 4, rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    ["linear:factor=4", "yarn:factor=4,beta_fast=16", "llama3:factor=8,low_freq_factor=1,high_freq_factor=4"],
)
def test_as_longrope_matches_transformers(text: str) -> None:
    config = parse_rope(text).apply(small_config())
    spelled = as_longrope(config)
    assert spelled.rope_scaling.rope_type == "longrope"
    lengths = [5, 64, 65, 250]
    for length, theirs in zip(lengths, ropes_of_theirs(spelled.to_dict(), lengths), strict=True):
        expected, attention_factor = frequencies(config, length)
        np.testing.assert_allclose(theirs[0], expected, rtol=1e-6)
        np.testing.assert_allclose(frequencies(spelled, length)[0], expected, rtol=1e-6)
        assert theirs[1] == pytest.approx(attention_factor, rel=1e-6)


@pytest.mark.parametrize("text", ["none", "dynamic:factor=4", "longrope:@both.json,factor=2"])
def test_as_longrope_keeps_other_scalings(text: str) -> None:
    config = parse_rope(text).apply(small_config())
    assert as_longrope(config) is config


WRONG = {
    "": "rope '': it is empty; use none, linear:factor=4",
    "ntk:factor=4": "rope 'ntk:factor=4': rope type 'ntk' is unknown; use one of default",
    "linear": "needs factor in rope_scaling",
    "linear:4": "'4' is neither key=value nor @FILE",
    "linear:factor=4,factor=5": "factor is given twice",
    "linear:factor=four": r"\['factor'\]='four' must be a number, 1 or more",
    "linear:factor=0.5": r"\['factor'\]=0.5 must be a number",
    "linear:factor=4,beta_fast=2": "rope type 'linear' has no use for beta_fast; it takes factor",
    "none:factor=2": "rope type 'default' has no use for factor; it takes nothing",
    "linear:factor=2,max_position_embeddings=1.5": "max_position_embeddings=1.5 must be a positive integer",
    "linear:factor=2,initial_tokens=-1": "initial_tokens=-1 must be a whole number, 0 or more",
    "linear:factor=2,partial_rotary_factor=0.5": "partial_rotary_factor=0.5 is not the model's 1.0",
    "yarn": "nothing says how far it extends the model's 64 tokens; add a factor or max_position_embeddings",
    "yarn:factor=4,beta_fast=1,beta_slow=32": "beta_fast=1 must not be below beta_slow=32",
    "longrope:@both.json": r"add a factor or .*, as in longrope:@both.json,max_position_embeddings=256",
    "longrope:@absent.json": "rope 'longrope:@absent.json': there is no file absent.json",
    "longrope:@broken.json": r"broken.json is not valid JSON: Expecting .* at line 2 column 1",
    "longrope:@array.json": "array.json holds a list; a rope is a JSON object",
    "longrope:@short.json,factor=4": r"\['long_factor'\] has 2 entries; give 6, one for each pair of",
    "longrope:@zero.json,factor=4": r"\['long_factor'\]\[3\]=0 must be a positive number",
    "longrope:@scalar.json,factor=4": r"\['long_factor'\]=2.0 must be a list of 6 positive numbers",
    "longrope:@twice.json": "factors is another name for long_factor; give one of them",
    "longrope:@more.json": "rope type 'longrope' has no use for seed; it takes short_factor, long_factor",
    "longrope:@rope.json": "the file is about 'yarn', not 'longrope'",
    "@both.json": "the file names no rope_type; lists of factors are given as longrope:@FILE",
    "absent.py:ntk:factor=4": "there is no file .*absent.py",
    "wrong.py:ntk:factor=4": "wrong.py: NameError: name 'rope_typo' is not defined",
    "@nested.json": r"rope_scaling\['full_attention'\] is a mapping",
}


@pytest.mark.parametrize("text", WRONG)
def test_rejects_in_one_line(text: str, tmp_path: Path) -> None:
    write(tmp_path / "broken.json", '{"long_factor": [1.0,\n')
    write(tmp_path / "array.json", LONG)
    write(tmp_path / "short.json", {"long_factor": [1.0, 2.0]})
    write(tmp_path / "zero.json", {"long_factor": [1, 1, 1, 0, 1, 1]})
    write(tmp_path / "scalar.json", {"long_factor": 2.0})
    write(tmp_path / "twice.json", {"long_factor": LONG, "factors": LONG})
    write(tmp_path / "more.json", {"factors": LONG, "seed": 3})
    write(tmp_path / "wrong.py", "@rope_typo\ndef ntk(base, seq_len):\n    pass\n")
    write(tmp_path / "nested.json", {"full_attention": {"rope_type": "default"}, "rope_type": "default"})
    with pytest.raises(ValueError, match=WRONG[text]) as caught:
        parse_rope(text).apply(small_config())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"rope {text!r}: ")
