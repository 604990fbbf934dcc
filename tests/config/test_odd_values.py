"""An odd value in a config file is read, left out with a warning, or an error that names it."""

import codecs
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import GenerationConfig, Phi3Config
from phi3_jax.config import generation_checks
from phi3_jax.errors import UserError

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 4, "eos_token_id": 2, "pad_token_id": 3}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2.0,
    "2",
    "x",
    "",
    [],
    [1],
    [[1]],
    ["2", -1],
    {},
    {"a": 1},
    {"0": None},
]
ODD += [
    2**40,
    -(2**70),
    1e300,
    float("nan"),
    float("inf"),
    [[[[[[]]]]]],
    "9" * 5000,
    "\ud800",
    {"a": [{"b": []}]},
]


def write(folder: Path, name: str, mapping: Any) -> Path:
    (folder / name).write_text(json.dumps(mapping), encoding="utf-8")
    return folder / name


CONFIG_FIELDS = [field.name for field in dataclasses.fields(Phi3Config)]
CONFIG_FIELDS += ["model_type", "label2id", "architectures", "use_cache", "torch_dtype", "auto_map"]


def read_config(folder: Path) -> tuple[Phi3Config | None, str]:
    """Returns the config of a folder, or the message of its error."""
    try:
        return Phi3Config.from_pretrained(folder), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_odd_value_in_the_config(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in ODD:
        path = write(tmp_path, "config.json", SIZES | {name: value})
        caplog.clear()
        config, message = read_config(tmp_path)
        if config is None:
            assert str(path) in message
            assert name in message or "num_labels" in message or "rotary" in message, message
            assert len(message) < 600, message[:900]
            continue
        for record in caplog.records:
            assert str(path) in record.getMessage()
            assert name in record.getMessage()
        again = Phi3Config.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        if name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            tokens = getattr(config, name)
            assert all(0 <= each < 99 for each in (tokens if isinstance(tokens, tuple) else (tokens or 0,)))


@pytest.mark.parametrize("name", [*generation_checks.RULES, "watermarking_config", "newer", "extra"])
def test_odd_value_in_the_generation_config(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for value in ODD:
        path = write(tmp_path, "generation_config.json", {name: value, "top_k": 7})
        caplog.clear()
        config = GenerationConfig.from_pretrained(tmp_path)  # never an error
        if (
            name in generation_checks.RULES
            and not generation_checks.RULES[name][1](value)
            and value is not None
        ):
            found = getattr(config, name)
            assert found is None or generation_checks.RULES[name][1](found)
        for record in caplog.records:
            assert name in record.getMessage()
        json.dumps(config.to_dict())
        if name != "top_k":
            assert config.top_k == 7
        assert path.exists()


@pytest.mark.parametrize(
    ("given", "read", "says"),
    [
        ({"pad_token_id": -1}, {"pad_token_id": None}, "pad_token_id=-1 must be a token id, 0 to 98"),
        ({"pad_token_id": "3"}, {"pad_token_id": 3}, "pad_token_id='3' must be .*; assumed: 3"),
        ({"eos_token_id": [2, "7", -1]}, {"eos_token_id": (2, 7)}, "eos_token_id=-1 .*; assumed: None"),
        ({"bos_token_id": 99}, {"bos_token_id": None}, "bos_token_id=99 must be"),
        ({"attention_dropout": "0.1"}, {"attention_dropout": 0.1}, "attention_dropout='0.1' must be a rate"),
        ({"initializer_range": None}, {"initializer_range": 0.02}, "initializer_range=None must be a number"),
        (
            {"problem_type": "ranking"},
            {"problem_type": None},
            "problem_type='ranking' must be one of regress",
        ),
        ({"id2label": {"0": None}}, {"num_labels": 2}, "id2label={'0': None} must be a mapping"),
        ({"label2id": {"a": None}}, {"num_labels": 2}, "label2id={'a': None} must be a mapping"),
    ],
)
def test_says_what_it_assumes_in_the_config(
    given: dict[str, Any], read: dict[str, Any], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "config.json", SIZES | given)
    config = Phi3Config.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in read} == read
    messages = [record.getMessage() for record in caplog.records]
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert re.search(says, "\n".join(messages))


@pytest.mark.parametrize("value", [-1, "64", None, 1.5])
@pytest.mark.parametrize(
    "name",
    ["hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps", "rope_scaling", "sliding_window"],
)
def test_numbers_of_the_model_stay_errors(name: str, value: Any, tmp_path: Path) -> None:
    if (name, value) in (("rope_scaling", None), ("sliding_window", None), ("rms_norm_eps", 1.5)):
        return
    path = write(tmp_path, "config.json", SIZES | {name: value})
    with pytest.raises(UserError, match=name) as caught:
        Phi3Config.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "read", "says"),
    [
        ({"eos_token_id": "2"}, {"eos_token_id": 2}, "eos_token_id='2' must be a token id .*; assumed: 2"),
        ({"eos_token_id": [2, "7", "x"]}, {"eos_token_id": (2, 7)}, r"; assumed: \[2, 7\]"),
        ({"eos_token_id": "</s>"}, {"eos_token_id": None}, "eos_token_id='</s>' .*; assumed: None"),
        ({"pad_token_id": -1}, {"pad_token_id": None}, "pad_token_id=-1 must be a token id"),
        ({"top_p": 3}, {"top_p": None}, "top_p=3 must be a number from 0 to 1; assumed: None"),
        ({"temperature": "0.7"}, {"temperature": 0.7}, "assumed: 0.7"),
        ({"do_sample": "true"}, {"do_sample": True}, "do_sample='true' must be True or False; assumed: True"),
        ({"max_new_tokens": 20.0}, {"max_new_tokens": 20}, "assumed: 20"),
    ],
)
def test_says_what_it_assumes_in_the_generation_config(
    given: dict[str, Any], read: dict[str, Any], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "generation_config.json", given)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in read} == read
    with pytest.raises(UserError):
        GenerationConfig(**given)  # in a call it is an error
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert re.search(says, record.getMessage())


def test_reads_files_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(codecs.BOM_UTF8 + json.dumps(SIZES).encode())
    (tmp_path / "generation_config.json").write_bytes(codecs.BOM_UTF8 + b'{"eos_token_id": 2}')
    assert Phi3Config.from_pretrained(tmp_path).vocab_size == 99
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
