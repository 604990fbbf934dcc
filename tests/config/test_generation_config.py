"""GenerationConfig matches transformers 5.23 in names, defaults and files; layers merge in order."""

import dataclasses
import json
import logging
import pickle
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored

from phi3_jax.config import generation_checks as checks
from phi3_jax.config.generation_config import DEFAULTS, GenerationConfig, ResolvedGeneration
from phi3_jax.config.model_config import Phi3Config

NAMES = {field.name for field in dataclasses.fields(GenerationConfig)} - {"extra"}
OURS = {"frequency_penalty", "presence_penalty", "rope_list"}

# For every field a value other than the default, as a user writes it and as it is kept.
VALUES: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k"), (7, 7)),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_assistant_tokens"), (3, 3)),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), (4, 4)),
    **dict.fromkeys(("no_repeat_ngram_size", "forced_bos_token_id", "pad_token_id", "bos_token_id"), (5, 5)),
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values", "use_cache"), (True, True)),
    **{name: (True, True) for name in NAMES if name.startswith(("output_", "return_dict"))},
    **dict.fromkeys(("temperature", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff"), (0.5, 0.5)),
    **dict.fromkeys(("eta_cutoff", "assistant_confidence_threshold", "max_time"), (0.25, 0.25)),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "guidance_scale"), (1.5, 1.5)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (-0.5, -0.5)),
    "early_stopping": ("never", "never"),
    "stop_strings": (["a", "bc"], ("a", "bc")),
    "cache_implementation": ("quantized", "quantized"),
    "bad_words_ids": ([[1], [2, 3]], ((1,), (2, 3))),
    "sequence_bias": ({(1, 2): -3.0, (4,): 1}, (((1, 2), -3.0), ((4,), 1.0))),
    "forced_eos_token_id": ([6, 7], (6, 7)),
    "exponential_decay_length_penalty": ((5, 1.5), (5, 1.5)),
    "suppress_tokens": ([8, 9], (8, 9)),
    "begin_suppress_tokens": ([10], (10,)),
    "eos_token_id": ([2, 11], (2, 11)),
    "rope_list": ("planned", "planned"),
}

BAD: dict[str, list[Any]] = {
    **{
        key: [0, -1, True, 2.0, 2**31]
        for key in ("max_length", "max_new_tokens", "num_beams", "num_return_sequences")
    },
    **{
        key: [0, "2"]
        for key in ("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size")
    },
    **{
        key: [-1, False, 1.5, 2**31]
        for key in ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size")
    },
    **{key: [1, 0, "yes"] for key in ("do_sample", "renormalize_logits", "remove_invalid_values")},
    **{key: [1, "no"] for key in [name for name in NAMES if name.startswith(("output_", "return_dict"))]},
    **{key: [-0.1, 1.1, True, float("nan")] for key in ("top_p", "min_p", "assistant_confidence_threshold")},
    **{key: [-0.1, 1.0, "0"] for key in ("epsilon_cutoff", "eta_cutoff")},
    **{key: [float("inf"), 1e300, "1", False] for key in ("frequency_penalty", "presence_penalty")},
    **{key: [float("nan"), True] for key in ("length_penalty", "guidance_scale")},
    **{key: [-1, 1.0, [1], True] for key in ("forced_bos_token_id", "pad_token_id", "bos_token_id")},
    **{key: [[], [-1], [True], 5, "ab"] for key in ("suppress_tokens", "begin_suppress_tokens")},
    "early_stopping": [1, "always", 0],
    "max_time": [0, -1.0, True, float("inf")],
    "stop_strings": ["", [], ["a", ""], ["a", 1], 5],
    "use_cache": [False, 1],
    "cache_implementation": ["offloaded", "Static", 1],
    "temperature": [-0.5, "hot", True, float("nan"), 1e-40, 1e300, 10**400],
    **{key: [0, 0.0, 1.5, True] for key in ("typical_p", "top_h")},
    "repetition_penalty": [0, -1.0, True, 1e-40, 1e300],
    "bad_words_ids": [[], [[]], [1], [[1], [-2]], 3],
    "sequence_bias": [{}, {5: 1.0}, {(5,): "x"}, {(): 1.0}, [[1, 2]], [[[1], 1.0, 2]], 4],
    "forced_eos_token_id": [[], -1, [1.5], "x"],
    "exponential_decay_length_penalty": [(1,), (1, 0), (-1, 1.5), (1.5, 1.5), (1, 1.5, 2), 3],
    "eos_token_id": [-1, [-1], [True], 2.0, "</s>"],
    "rope_list": ["Long", 1, "auto"],
}


def phi3(**more: Any) -> Phi3Config:
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return Phi3Config(**(sizes | tokens | {"max_position_embeddings": 64} | more))


def resolve(
    overrides: dict[str, Any] | None = None,
    config: GenerationConfig | None = None,
    model: GenerationConfig | None = None,
    *,
    prompt_length: int = 10,
    batch_size: int = 1,
    **sizes: Any,
) -> ResolvedGeneration:
    return (config or GenerationConfig()).resolve(
        overrides,
        model_default=model or GenerationConfig(),
        config=phi3(**sizes),
        prompt_length=prompt_length,
        batch_size=batch_size,
    )


@stored
def names_of_theirs() -> list[str]:
    import transformers

    return sorted(transformers.GenerationConfig().to_dict())


@stored
def defaults_of_theirs() -> dict[str, Any]:
    import transformers

    return transformers.GenerationConfig._get_default_generation_params()


def test_knows_every_name_of_transformers() -> None:
    theirs = set(names_of_theirs()) - {"transformers_version", "_from_model_config"}
    assert theirs - NAMES == set(checks.UNSUPPORTED)
    assert NAMES - theirs == OURS
    assert set(checks.RULES) == NAMES == set(VALUES) == set(BAD)


def test_defaults_match_transformers() -> None:
    theirs = defaults_of_theirs()
    shared = {name: value for name, value in theirs.items() if name in NAMES and value is not None}
    assert shared.pop("max_length") == 20
    # Where transformers leaves None, its code then does this.
    unset = dict.fromkeys(["renormalize_logits", "output_attentions", "output_hidden_states"], False)
    assert shared | unset | {"output_logits": False, "max_matching_ngram_size": 2} == {
        name: value for name, value in DEFAULTS.items() if name not in OURS
    }
    neutral = {name: unsupported.neutral for name, unsupported in checks.UNSUPPORTED.items()}
    for name, value in theirs.items():
        assert name in NAMES or value is None or value in neutral[name], name


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_field_keeps_good_values_and_rejects_others(name: str) -> None:
    given, kept = VALUES[name]
    config = GenerationConfig(**{name: given})
    assert getattr(config, name) == kept
    assert type(getattr(config, name)) is type(kept)
    assert config.explicit_values() == {name: kept}
    assert name in repr(config)
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name}=.* must be "):
            GenerationConfig(**{name: value})
    assert GenerationConfig(**{name: None}) == GenerationConfig()


def test_turns_whole_numbers_into_floats() -> None:
    """transformers refuses `temperature=2` and the like."""
    config = GenerationConfig(temperature=2, repetition_penalty=1, top_p=1, max_time=3, top_k=4)
    assert {type(value) for value in config.replace(top_k=None).explicit_values().values()} == {float}
    assert type(config.top_k) is int


def torch_tensor(values: Any) -> Any:
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize("array", [jnp.array, pytest.param(torch_tensor, marks=pytest.mark.live)])
def test_takes_values_from_arrays(array: Any) -> None:
    config = GenerationConfig(
        eos_token_id=np.array([2, 7]),
        pad_token_id=np.int64(3),
        temperature=np.float64(0.5),
        suppress_tokens=array([4, 5]),
        bad_words_ids=np.array([[1, 2]]),
        do_sample=np.bool_(True),
        begin_suppress_tokens=range(3),
    )
    assert config.eos_token_id == config.eos_token_ids == (2, 7)
    assert config.suppress_tokens == (4, 5)
    assert config.bad_words_ids == ((1, 2),)
    assert config.begin_suppress_tokens == (0, 1, 2)
    assert json.loads(json.dumps(config.to_dict()))["pad_token_id"] == 3
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))


def test_is_frozen_and_replace_changes_a_copy() -> None:
    config = GenerationConfig(temperature=0.5, eos_token_id=2, extra={"_from_model_config": True, "x": [1]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 1.0  # type: ignore[misc]
    changed = config.replace(temperature=None, top_p=0.5)
    assert changed == GenerationConfig(top_p=0.5, eos_token_id=2, extra={"x": [1]})
    assert config.temperature == 0.5
    with pytest.raises(ValueError, match="top_p=2"):
        config.replace(top_p=2)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temprature": 1.0}, TypeError, "'temprature'; did you mean 'temperature'"),
        ({"max_tokens": 5}, TypeError, "did you mean 'max_new_tokens'"),
        ({"stop": "x"}, TypeError, "'stop'; did you mean 'stop_strings'"),
        ({"qqq": 1}, TypeError, "'qqq'; see GenerationConfig"),
        ({"streamer": None}, TypeError, "streamer is an argument of generate"),
        ({"logits_processor": []}, TypeError, "argument of generate"),
        ({"num_beam_groups": 2}, ValueError, r"num_beam_groups=2 is not supported; use plain beam search"),
        ({"penalty_alpha": 0.6}, ValueError, "penalty_alpha=0.6 is not supported; use do_sample"),
        ({"dola_layers": "high"}, ValueError, "dola_layers='high' is not supported"),
        ({"num_assistant_tokens_schedule": "heuristic"}, ValueError, "'heuristic' is not supported"),
        ({"watermarking_config": {"bias": 2.0}}, ValueError, "write a logits_processor"),
        ({"force_words_ids": [[5]]}, ValueError, "prefix_allowed_tokens_fn"),
        ({"use_mtp": True}, ValueError, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, ValueError, "use_cache=False must be True: generation always keeps the cache"),
    ],
)
def test_rejects_wrong_names(given: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (lambda: GenerationConfig(**given), lambda: resolve(given)):
        with pytest.raises(error, match=message):
            make()


def test_accepts_unsupported_names_with_values_without_effect() -> None:
    given = {"num_beam_groups": 1, "diversity_penalty": 0.0, "num_assistant_tokens_schedule": "constant"}
    given |= {"use_mtp": False, "watermarking_config": None, "dola_layers": None, "top_k": 5}
    assert GenerationConfig(**given) == GenerationConfig(top_k=5)


@stored
def read_by_theirs(written: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Returns settings that the reference reads from a file, and the biases that its processor gets."""
    import transformers

    with TemporaryDirectory() as folder:
        (Path(folder) / "generation_config.json").write_text(json.dumps(written))
        config = transformers.GenerationConfig.from_pretrained(folder)
    found = {name: getattr(config, name) for name in names}
    if config.sequence_bias is not None:
        biases = transformers.SequenceBiasLogitsProcessor(config.sequence_bias).sequence_bias
        found["biases"] = list(biases.items())
    return found


@pytest.mark.parametrize("name", sorted(NAMES))
def test_transformers_reads_our_file(name: str, tmp_path: Path) -> None:
    needed = {"do_sample": True, "return_dict_in_generate": True}  # else transformers warns
    given = {name: VALUES[name][0]} | ({} if name in needed else needed)
    if name in ("early_stopping", "length_penalty", "num_return_sequences"):
        given["num_beams"] = 3
    config = GenerationConfig(**given, extra={"is_assistant": False, "some_newer_option": [1]})
    assert (
        config.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new/folder/generation_config.json"
    )
    written = json.loads((tmp_path / "new" / "folder" / "generation_config.json").read_text())
    theirs = read_by_theirs(written, [*sorted(config.explicit_values()), "some_newer_option"])
    for field, value in config.explicit_values().items():
        listed = json.loads(json.dumps(value))
        assert theirs[field] == listed, field
    assert theirs["some_newer_option"] == [1]
    assert GenerationConfig.from_pretrained(tmp_path / "new" / "folder") == config
    if name == "sequence_bias":
        assert {tuple(words): bias for words, bias in theirs["biases"]} == VALUES[name][0]


@stored
def written_by_theirs(given: dict[str, Any]) -> str:
    """Returns the file that the reference saves."""
    import transformers

    with TemporaryDirectory() as folder:
        transformers.GenerationConfig(**given).save_pretrained(folder)
        return (Path(folder) / "generation_config.json").read_text()


def test_reads_transformers_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {name: VALUES[name][0] for name in NAMES - OURS - {"sequence_bias", "num_return_sequences"}}
    given["sequence_bias"] = [[[1, 2], -3.0]]
    given["max_length"] = None
    file = written_by_theirs(given)
    (tmp_path / "generation_config.json").write_text(file)
    with caplog.at_level(logging.WARNING):
        ours = GenerationConfig.from_pretrained(tmp_path / "generation_config.json")
    assert not caplog.records
    expected = GenerationConfig(**given)
    assert ours.explicit_values() == expected.explicit_values()
    assert ours.extra == {"transformers_version": json.loads(file)["transformers_version"]}


def test_saving_keeps_unknown_keys_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    mapping = {
        "_from_model_config": True,
        "eos_token_id": [2, 7],
        "temperature": 0.6,
        "transformers_version": "4.41.2",
        "continuous_batching_config": None,
        "extra": {"a": 1},
        "use_cache": False,
        "cache_implementation": "hybrid",
        "newer": {"b": [1, 2]},
    }
    config = GenerationConfig.from_dict(mapping)
    assert config.explicit_values() == {"eos_token_id": (2, 7), "temperature": 0.6}
    assert config.to_dict() == mapping
    assert config.replace(use_cache=True).to_dict()["use_cache"] is True
    config.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_config.json", "model.safetensors"]
    assert GenerationConfig.from_pretrained(tmp_path) == config
    mapping["newer"]["b"].append(3)  # type: ignore[index]
    assert config.extra["newer"] == {"b": [1, 2]}


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (
            {"watermarking_config": {"bias": 2.0}, "penalty_alpha": 0.6},
            ["watermarking_config", "penalty_alpha=0.6"],
        ),
        ({"num_beam_groups": 1, "diversity_penalty": 0.0, "token_healing": False, "max_cache_len": 9}, []),
        ({"encoder_repetition_penalty": 1.0, "dola_layers": None, "newer_option": True}, []),
        ({"use_cache": False, "cache_implementation": "offloaded"}, []),
    ],
)
def test_warns_of_ignored_settings_that_change_the_output(
    mapping: dict[str, Any], named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = GenerationConfig.from_dict(mapping)
    assert config.extra == mapping
    assert len(caplog.records) == bool(named)
    assert all(name in caplog.text for name in named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON: .* line 1 column 2"),
        ("[1]", "holds a list; a generation config is a JSON object"),
    ],
)
def test_rejects_broken_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{message}"):
        GenerationConfig.from_pretrained(tmp_path)


def test_rejects_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"from_model\(config\)"):
            GenerationConfig.from_pretrained(path)
    ours = GenerationConfig.from_model(phi3(eos_token_id=[2, 5]))
    assert ours.explicit_values() == {"bos_token_id": 1, "eos_token_id": (2, 5), "pad_token_id": 3}


def test_upper_layers_override_lower_ones() -> None:
    model = GenerationConfig(do_sample=True, temperature=0.6, top_k=9, eos_token_id=[2, 7], pad_token_id=7)
    config = GenerationConfig(temperature=0.7, top_k=8)
    resolved = resolve({"temperature": 0.8, "top_p": None}, config, model)
    assert (resolved.temperature, resolved.top_k, resolved.top_p, resolved.do_sample) == (0.8, 8, 1.0, True)
    assert (resolved.eos_token_id, resolved.pad_token_id, resolved.bos_token_id) == ((2, 7), 7, 1)
    missing = [name for name in DEFAULTS if getattr(resolved, name) is None]
    assert not missing
    assert {name: getattr(resolve(), name) for name in DEFAULTS} == DEFAULTS
    assert (resolved.prompt_length, resolved.batch_size) == (10, 1)


@stored
def lengths_of_theirs(given: dict[str, int], prompt_length: int) -> tuple[int, int]:
    """Returns the reference's greatest and least length in a context of 64."""
    import torch
    import transformers

    config = transformers.GenerationConfig(**given)
    unset = [config.max_length is None, config.min_length is None]
    config.update(**transformers.GenerationConfig._get_default_generation_params(), defaults_only=True)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64, is_encoder_decoder=False))
    logging.disable(logging.WARNING)  # of two limits
    try:
        config = transformers.GenerationMixin._prepare_generated_length(
            model, config, *unset, "input_ids", prompt_length, torch.zeros(1, prompt_length)
        )
    finally:
        logging.disable(logging.NOTSET)
    return config.max_length, config.min_length


@pytest.mark.parametrize("prompt_length", [1, 10, 50, 63])
@pytest.mark.parametrize(
    "model",
    [
        *({}, {"max_new_tokens": 5}, {"max_length": 64}, {"max_new_tokens": 5, "max_length": 64}),
        *(
            {"min_length": 12},
            {"min_new_tokens": 3},
            {"min_length": 12, "min_new_tokens": 3, "max_length": 64},
        ),
    ],
)
def test_lengths_match_transformers(model: dict[str, int], prompt_length: int) -> None:
    theirs_longest, theirs_shortest = lengths_of_theirs(model, prompt_length)
    resolved = resolve(model=GenerationConfig(**model), prompt_length=prompt_length)
    longest = min(theirs_longest, 64)  # ours never passes the context
    assert resolved.max_length == prompt_length + resolved.max_new_tokens == longest
    shortest = min(theirs_shortest, longest)
    assert resolved.min_new_tokens == max(0, shortest - prompt_length)
    assert resolved.min_length == (prompt_length + resolved.min_new_tokens if resolved.min_new_tokens else 0)


def test_topmost_layer_decides_the_length() -> None:
    file, config = GenerationConfig(max_new_tokens=50, min_length=13), GenerationConfig(max_length=30)
    assert resolve({}, None, file).max_new_tokens == 50
    assert resolve({"max_length": 15}, None, file).max_new_tokens == 5
    assert resolve({}, config, file).max_new_tokens == 20
    assert resolve({"max_new_tokens": 4}, config, file).max_new_tokens == 4
    assert resolve({"max_new_tokens": 4}, config, file).min_new_tokens == 3
    assert resolve({"max_new_tokens": 2}, config, file).min_new_tokens == 2, "the file's, cut silently"
    assert resolve({"max_new_tokens": 4, "min_new_tokens": 1}, config, file).min_new_tokens == 1


def test_context_limits_new_tokens() -> None:
    match = "99 new tokens after a prompt of 10 would pass the model's context of 64 .*; at most 54"
    for given in ([{"max_new_tokens": 99}], [{}, GenerationConfig(max_length=109)]):
        with pytest.warns(UserWarning, match=match) as caught:
            assert resolve(*given).max_new_tokens == 54
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve({}, None, GenerationConfig(max_new_tokens=99)).max_new_tokens == 54
        assert resolve(prompt_length=60).max_new_tokens == 4
        assert resolve({"max_new_tokens": 54}).max_new_tokens == 54
        assert resolve(prompt_length=64).max_new_tokens == 20, (
            "a prompt that is too long is an error elsewhere"
        )


SAMPLED = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "top_h": 0.5,
} | dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), 0.01)
BEAMS = {"early_stopping": True, "length_penalty": 0.5}
OUTPUTS = dict.fromkeys(sorted(name for name in NAMES if name.startswith("output_")), True)


@pytest.mark.parametrize(
    ("name", "value", "advice", "cure"),
    [
        *((name, value, "set do_sample=True", {"do_sample": True}) for name, value in SAMPLED.items()),
        *((name, value, "set num_beams above 1", {"num_beams": 2}) for name, value in BEAMS.items()),
        *(
            (name, value, "set return_dict_in_generate=True", {"return_dict_in_generate": True})
            for name, value in OUTPUTS.items()
        ),
    ],
)
def test_rejects_settings_without_effect(name: str, value: Any, advice: str, cure: dict[str, Any]) -> None:
    match = rf"{name}={value!r} has no effect.*{advice}"
    ((other, _),) = cure.items()
    for given in ({name: value}, {name: value, other: DEFAULTS[other]}):
        with pytest.raises(ValueError, match=match):
            resolve(given)
    with pytest.raises(ValueError, match=match):
        resolve({}, GenerationConfig(**{name: value}))
    assert getattr(resolve({name: value} | cure), name) == value
    assert getattr(resolve({name: value}, None, GenerationConfig(**cure)), name) == value
    # In the model's own file it is not an error, even where the user starts from that file.
    file = GenerationConfig(**{name: value})
    assert getattr(resolve({}, None, file), name) == value
    assert getattr(resolve({"max_new_tokens": 3}, file.replace(bos_token_id=4), file), name) == value
    # A neutral value is not an error either.
    if name in DEFAULTS:
        resolve({name: DEFAULTS[name]})


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (
            {"max_new_tokens": 5, "max_length": 30},
            {},
            "max_new_tokens=5 and max_length=30 .*give max_new_tokens",
        ),
        ({"min_new_tokens": 5, "min_length": 30}, {}, "min_new_tokens=5 and min_length=30"),
        (
            {"max_length": 10},
            {},
            "max_length=10 leaves no room.* 10 already; give max_length above 10, or max_new",
        ),
        ({}, {"max_length": 4}, "max_length=4 leaves no room"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, {}, r"at least 6 .*\(min_new_tokens\) and at most 5"),
        (
            {"min_length": 40, "max_length": 30},
            {},
            r"at least 30 .*\(min_length\) and at most 20 .*\(max_length\)",
        ),
        ({"min_new_tokens": 21}, {}, r"at most 20 new tokens|at most 20 \(the default of max_new_tokens\)"),
        (
            {"do_sample": True, "temperature": 0},
            {},
            "temperature=0 cannot be sampled from; use do_sample=False",
        ),
        ({"do_sample": True}, {"temperature": 0.0}, "temperature=0 cannot be sampled"),
        ({"num_return_sequences": 2}, {}, "num_return_sequences=2 .*do_sample=True, or num_beams=2"),
        ({"num_beams": 2, "num_return_sequences": 3}, {}, "num_return_sequences=3 is more than num_beams=2"),
        (
            {"forced_eos_token_id": 5, "suppress_tokens": [5, 6]},
            {},
            "forced_eos_token_id=5 is in suppress_tokens",
        ),
        ({"eos_token_id": 96}, {}, "eos_token_id names the token 96, .*vocab_size=96 use 0 to 95"),
        ({"eos_token_id": [2, 100]}, {}, "eos_token_id names the token 100"),
        ({"pad_token_id": 96}, {}, "pad_token_id names the token 96"),
        ({"suppress_tokens": [96]}, {}, "suppress_tokens names the token 96"),
        ({"bad_words_ids": [[1], [2, 96]]}, {}, "bad_words_ids names the token 96"),
        ({"sequence_bias": {(1, 96): 1.0}}, {}, "sequence_bias names the token 96"),
        ({"forced_eos_token_id": [1, 96]}, {}, "forced_eos_token_id names the token 96"),
        ({}, {"pad_token_id": 96}, "pad_token_id names the token 96"),
        ({"rope_list": "long"}, {}, "rope_list='long' .* this model is 'default'; leave it out"),
    ],
)
def test_rejects_contradictions(overrides: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(overrides, None, GenerationConfig(**model))


def test_accepts_settings_that_only_look_contradictory() -> None:
    assert resolve({"temperature": 0.0}).temperature == 0.0, "greedy, as others spell it"
    assert resolve({"do_sample": True, "num_return_sequences": 3}).num_return_sequences == 3
    assert resolve({"num_beams": 3, "num_return_sequences": 3}).num_return_sequences == 3
    assert resolve({"forced_eos_token_id": [5, 6], "suppress_tokens": [5]}).forced_eos_token_id == (5, 6)
    assert resolve({"rope_list": "switch"}).rope_list == "switch"
    assert resolve({}, None, GenerationConfig(eos_token_id=[2, 500])).eos_token_id == (2, 500)
    file = GenerationConfig(max_length=40, max_new_tokens=5, rope_list="long", temperature=0.0)
    assert resolve({}, None, file).max_new_tokens == 5
    assert resolve({}, file, file).max_new_tokens == 5


def test_accepts_rope_list_for_longrope_models() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": 32}
    assert resolve({"rope_list": "planned"}, **longrope).rope_list == "planned"


def test_chooses_special_tokens() -> None:
    assert resolve().eos_token_id == (2,)
    assert resolve(eos_token_id=[2, 5]).eos_token_id == (2, 5)
    assert resolve({"eos_token_id": []}).eos_token_id == ()
    assert resolve({"eos_token_id": []}, None, GenerationConfig(eos_token_id=7)).eos_token_ids == ()
    assert resolve({"eos_token_id": 9}, None, GenerationConfig(eos_token_id=7)).eos_token_ids == (9,)
    assert resolve().pad_token_id == 3
    assert resolve({"pad_token_id": 0}).pad_token_id == 0
    assert resolve({}, None, GenerationConfig(eos_token_id=[7, 8]), pad_token_id=None).pad_token_id == 7
    assert resolve(pad_token_id=None, eos_token_id=None).pad_token_id is None
    none = {"pad_token_id": None, "eos_token_id": None}
    assert resolve(batch_size=4, **none).pad_token_id is None
    assert resolve({"stop_strings": "x"}, **none).stop_strings == ("x",)
    for several in ({"batch_size": 2}, {"overrides": {"num_return_sequences": 2, "do_sample": True}}):
        overrides = {"stop_strings": ["x", "y"]} | several.pop("overrides", {})
        with pytest.raises(ValueError, match=r"padding token.*give pad_token_id"):
            resolve(overrides, **several, **none)
    assert resolve({"stop_strings": ["x", "y"]}, batch_size=2).stop_strings == ("x", "y")
