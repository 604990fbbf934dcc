"""Ropes written for transformers and vLLM have the same frequencies there, and can be read again."""

import json
import shlex
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from rope_cases import (
    CONTEXT,
    HEAD_DIM,
    LENGTHS,
    LISTS,
    ORIGINAL,
    ROPES,
    TWO_ATTENTION_FACTORS,
    assert_same_rope,
    frequencies,
    rope_config,
)

from phi3_jax import Phi3Config
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.config.rope_types import ROPE_TYPES, rope_type
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.interchange import hf_overrides, read_rope, transformers_fields
from phi3_jax.rope_lab.interchange.json_text import json_text
from phi3_jax.rope_lab.interchange.reading import summary
from phi3_jax.rope_lab.interchange.vllm import serve_command

MODEL_TYPES = ["phi3", "llama"]
SIZES = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4}


@stored
def their_frequencies(model_type: str, fields: dict[str, Any], update: bool = False) -> Any:
    """Returns transformers' frequencies and attention factors for `LENGTHS`.

    With `update`, fields of a plain config are replaced as vLLM replaces them.
    """
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.for_model(model_type, **SIZES | ({} if update else fields))
    if update:
        config.update(fields)
        config.standardize_rope_params()
        config.validate_rope()
    if config.rope_parameters["rope_type"] == "default":
        answers = [LlamaRotaryEmbedding.compute_default_rope_parameters(config)] * len(LENGTHS)
    else:
        formula = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        answers = [formula(config, torch.device("cpu"), seq_len=length) for length in LENGTHS]
    return [(inv_freq, float(attention)) for inv_freq, attention in answers]


def read_back(content: Any, folder: Path, model_type: str | None = None) -> Phi3Config:
    """Returns the config of the small model with a rope that was written, read as a file for `--rope`."""
    file, factors = folder / "written.json", folder / "factors.json"
    file.write_text(json.dumps(content if model_type is None else {**content, "model_type": model_type}))
    factors.write_text(json_text(read_rope(file)))
    return parse_rope(f"@{factors}").apply(rope_config("default"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("name", sorted({*ROPES} - {*TWO_ATTENTION_FACTORS}))
def test_transformers_has_the_same_frequencies(name: str, model_type: str, tmp_path: Path) -> None:
    config = rope_config(name)
    if (name, model_type) == ("dynamic", "phi3"):
        with pytest.raises(
            UserError, match=r"'dynamic' changes its frequencies .* transformers for phi3 has"
        ):
            transformers_fields(config, model_type)
        return
    fields = transformers_fields(config, model_type)
    assert_same_rope(their_frequencies(model_type, fields), frequencies(config))
    assert_same_rope(frequencies(read_back(fields, tmp_path, model_type)), frequencies(config))


def test_transformers_for_llama_keeps_the_names_of_types() -> None:
    fields = transformers_fields(rope_config("yarn-betas"), "llama")
    assert fields == {
        "rope_scaling": ROPES["yarn-betas"] | {"original_max_position_embeddings": ORIGINAL},
        "max_position_embeddings": CONTEXT,
        "rope_theta": 50000.0,
    }


def test_a_longrope_of_phi3_has_the_three_fields_that_transformers_4_asks_for() -> None:
    fields = transformers_fields(rope_config("longrope"))
    assert fields["rope_scaling"] == {"type": "longrope", **LISTS}
    assert fields["original_max_position_embeddings"] == ORIGINAL
    own = transformers_fields(rope_config("longrope-attention-factor"))
    assert own["rope_scaling"] == {"type": "longrope", **LISTS, "attention_factor": 1.3}


@pytest.mark.parametrize("name", TWO_ATTENTION_FACTORS)
def test_transformers_has_one_attention_factor(name: str) -> None:
    with pytest.raises(UserError, match=r"1\.\d* for long ones; transformers for llama has one for both"):
        transformers_fields(rope_config(name), "llama")


def test_partial_rotation() -> None:
    config = rope_config("longrope", head_dim=64, partial_rotary_factor=0.5)
    sizes = {"hidden_size": 4 * 64, "num_attention_heads": 4, "partial_rotary_factor": 0.5}
    fields = transformers_fields(config)
    assert fields["partial_rotary_factor"] == 0.5
    assert_same_rope(their_frequencies("phi3", fields | sizes), frequencies(config))
    with pytest.raises(UserError, match=r"partial_rotary_factor=0\.5: all dims of a Llama rotate"):
        transformers_fields(config, "llama")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("name", sorted({*ROPES} - {"dynamic"}))
def test_vllm_has_the_same_frequencies(name: str, model_type: str, tmp_path: Path) -> None:
    """vLLM's rope gets the entry of a config that its overrides have changed."""
    config = rope_config(name)
    overrides = hf_overrides(config, model_type)
    entry, ours = overrides["rope_parameters"], frequencies(config)
    theirs = their_frequencies(model_type, overrides, update=True)
    if entry["rope_type"] == "longrope":  # its attention factors have names of their own in vLLM
        factors = [entry["long_mscale"] if n > ORIGINAL else entry["short_mscale"] for n in LENGTHS]
        theirs = [(inv_freq, factor) for (inv_freq, _), factor in zip(theirs, factors, strict=True)]
    assert_same_rope(theirs, ours)
    assert_same_rope(frequencies(read_back(overrides, tmp_path)), ours)


def test_vllm_has_names_only_for_what_all_its_versions_compute() -> None:
    types = {
        name: hf_overrides(rope_config(name), "llama")["rope_parameters"] for name in {*ROPES} - {"dynamic"}
    }
    native = {name: entry["rope_type"] for name, entry in types.items() if entry["rope_type"] != "longrope"}
    assert native == {
        name: name.partition("-")[0]
        for name in ("default", "linear", "llama3", "yarn", "yarn-betas", "yarn-beta-fast")
    }
    assert not {"attention_factor", "truncate"} & types["yarn"].keys()


def test_vllm_computes_dynamic_otherwise() -> None:
    with pytest.raises(UserError, match="vLLM computes rope type 'dynamic' for its longest text"):
        hf_overrides(rope_config("dynamic"), "llama")


def test_the_command_of_vllm_can_be_pasted_into_a_shell() -> None:
    overrides = hf_overrides(rope_config("longrope"))
    words = shlex.split(serve_command("my model", overrides, CONTEXT))
    assert words[:5] == ["vllm", "serve", "my model", "--max-model-len", str(CONTEXT)]
    assert json.loads(words[words.index("--hf-overrides") + 1]) == overrides


@pytest.fixture
def waves() -> Any:
    @rope_type("waves")
    def formula(base: Any, seq_len: Any, *, factor: float) -> Any:
        grown = 1 + (factor - 1) * jnp.minimum(seq_len / 512, 1)
        return base.inv_freq()[None] / grown[:, None], 1.0

    yield formula
    del ROPE_TYPES["waves"]


@pytest.mark.usefixtures("waves")
@pytest.mark.parametrize("write", [transformers_fields, hf_overrides])
def test_a_type_of_the_users_whose_frequencies_change_with_the_length_is_an_error(write: Any) -> None:
    config = rope_config("default").replace(rope_scaling={"rope_type": "waves", "factor": 4.0})
    with pytest.raises(UserError, match="'waves' changes its frequencies with a text's length"):
        write(config)


def test_another_family_is_an_error() -> None:
    config = Phi3Config.preset("phi-3-small-8k-instruct")
    with pytest.raises(UserError, match="model_type='phi3small': its rope has no other format"):
        transformers_fields(config)


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 4 * HEAD_DIM,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 50000.0,
}
READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transformers 4": (
        QWEN | {"rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_type": "linear", "factor": 2.5},
    ),
    "transformers 5": (
        {**QWEN, "rope_theta": None, "rope_parameters": {**ROPES["llama3"], "rope_theta": 50000.0}},
        {**ROPES["llama3"], "original_max_position_embeddings": CONTEXT},
    ),
    "finetuned": (
        QWEN
        | {"rope_scaling": {**ROPES["yarn"], "finetuned": True, "original_max_position_embeddings": 256}},
        {**ROPES["yarn"], "original_max_position_embeddings": 256},
    ),
    "no rope": (QWEN, {"rope_type": "default"}),
    "images": (
        {
            "model_type": "qwen2_vl",
            "text_config": QWEN | {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
        },
        ROPES["dynamic"],
    ),
    "su": (
        {**QWEN, "model_type": "phi3", "rope_scaling": {"type": "su", **LISTS}},
        {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 4096},
    ),
    "early Phi-3": (
        QWEN
        | {"model_type": "phi3", "original_max_position_embeddings": 256}
        | {"rope_scaling": {"type": "yarn", **LISTS}},
        {"rope_type": "phi3-yarn", **LISTS, "original_max_position_embeddings": 256},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_reads_configs(name: str, tmp_path: Path) -> None:
    content, expected = READ[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    lengths = {"max_position_embeddings": CONTEXT, "rope_theta": 50000.0}
    assert read_rope(tmp_path / "config.json") == expected | lengths


def test_reads_an_entry_by_itself(tmp_path: Path) -> None:
    """A search's factors.json becomes the same rope, without its comments."""
    content = {
        **ROPES["longrope"],
        "attention_factor": 1.2,
        "initial_tokens": 4,
        "about": {"perplexity": 3.0},
    }
    (tmp_path / "factors.json").write_text(json.dumps(content))
    del content["about"]
    assert read_rope(tmp_path / "factors.json") == content


def test_reads_phi3small(tmp_path: Path) -> None:
    entry = {"type": "su", **LISTS, "short_mscale": 1.1, "long_mscale": 1.4}
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "num_key_value_heads": 4}
    content = Phi3Config.preset("phi-3-small-8k-instruct").to_dict() | sizes
    content |= {"max_position_embeddings": 4 * 8192, "rope_scaling": entry}
    content |= {"rope_embedding_base": 50000.0, "original_max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(content))
    rope = read_rope(tmp_path / "config.json")
    assert summary(rope) == (
        "phi3small, original length 8,192, context 32,768, attention factor 1.1000 (short) and 1.4000 (long)"
    )
    content |= {"rope_position_scale": 2.0, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rope_position_scale=2\.0 cannot be expressed"):
        read_rope(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (
            {**ROPES["yarn"], "max_position_embeddings": 1024, "original_max_position_embeddings": 256},
            "yarn, original length 256, context 1,024, attention factor 1.1386",
        ),
        (
            {**ROPES["dynamic"], "max_position_embeddings": 256},
            "dynamic, context 768, attention factor 1.0000",
        ),
        (ROPES["longrope"], "longrope"),
        (ROPES["longrope-attention-factor"], "longrope, attention factor 1.3000"),
    ],
)
def test_summary(rope: dict[str, Any], expected: str) -> None:
    assert summary(rope) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list"),
        ({"hidden_size": 8}, "has neither rope_parameters nor rope_scaling"),
        (QWEN | {"rope_scaling": {"type": "dynamic", "alpha": 8.0}}, "'dynamic' has no use for alpha"),
        (QWEN | {"rope_scaling": {"type": "linear"}}, "needs factor"),
        (QWEN | {"rope_scaling": {"type": "linear", "factor": -1}}, "must be a number, 1 or more"),
        (QWEN | {"rope_scaling": {"type": "wide"}}, "rope type 'wide' is unknown"),
        (QWEN | {"rope_scaling": 3}, "must be objects"),
        (QWEN | {"rope_parameters": {"full_attention": ROPES["yarn"]}}, "is a mapping"),
        (
            QWEN | {"rope_scaling": ROPES["yarn"], "rope_parameters": ROPES["linear"]},
            "contradict each other",
        ),
        (QWEN | {"rope_parameters": {**ROPES["yarn"], "rope_theta": 7.0}}, "rope_theta is 7.0 in the rope"),
        (QWEN | {"rope_theta": "high"}, "rope_theta='high' must be a positive number"),
        (QWEN | {"max_position_embeddings": 1.5}, "max_position_embeddings=1.5 must be a positive integer"),
        (
            QWEN | {"rope_scaling": {"type": "longrope", **LISTS, "long_factor": [1.0, 0.0]}},
            "has 16 entries; give 2",
        ),
    ],
)
def test_rejects_what_is_no_rope(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_rope(tmp_path / "config.json")
    assert str(error.value).startswith(str(tmp_path / "config.json"))


def test_lists_take_one_line() -> None:
    value = {"a": {"b": [1.0, 2.5]}, "c": None, "d": {}}
    text = json_text(value)
    assert json.loads(text) == value
    assert text.splitlines()[2] == '    "b": [1.0, 2.5]'
    assert np.isfinite(json.loads(text)["a"]["b"]).all()
