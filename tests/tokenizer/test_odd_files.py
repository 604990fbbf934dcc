"""Odd values in a tokenizer's files are read, left out with a warning, or an error that names the file."""

import json
import logging
import shutil
from typing import Any

import pytest
from small_tokenizers import write_json

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    {"content": 3},
    2**40,
    float("nan"),
    [[]],
]
ODD += [
    {"1": {}},
    {"-1": "x"},
    {"9" * 5000: "x"},
    [{"name": "a", "template": 3}],
    {"x": "y"},
    [{"content": "<s>"}],
]
NAMES = ["bos_token", "pad_token", "padding_side", "truncation_side", "model_max_length", "add_bos_token"]
NAMES += [
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens_decoder",
    "chat_template",
    "legacy",
]
CASES = [("tokenizer_config.json", name) for name in NAMES]
CASES += [("special_tokens_map.json", name) for name in ("bos_token", "extra_special_tokens")]
CASES += [("added_tokens.json", "<s>"), ("chat_template.json", "chat_template")]


@pytest.fixture(scope="module")
def folder(piece_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("odd")
    shutil.copyfile(piece_folders.json / "tokenizer.json", folder / "tokenizer.json")
    return folder


def read(folder: Any) -> Phi3Tokenizer | str:
    """Returns the tokenizer, or the message of its error."""
    try:
        return Phi3Tokenizer.from_pretrained(folder)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("file", "name"), CASES)
def test_odd_value(folder, caplog, file, name):
    for value in ODD:
        path = write_json(folder / file, {name: value})
        caplog.clear()
        found = read(folder)
        if isinstance(found, str):
            assert str(folder) in found, (value, found)
            assert len(found) < 500, (value, found[:600])
            continue
        assert found.decode(found.encode("the dog")) == "the dog"
        json.dumps(found.special_tokens_map)
        assert found.all_special_ids is not None
        assert all(name in record.getMessage() for record in caplog.records)
    path.unlink()


def test_says_what_it_assumes(folder, caplog):
    path = write_json(
        folder / "tokenizer_config.json",
        {"pad_token": 3, "model_max_length": "512", "padding_side": "middle", "eos_token": "</s>"},
    )
    with caplog.at_level(logging.WARNING):
        tokenizer = Phi3Tokenizer.from_pretrained(folder)
    path.unlink()
    assert (tokenizer.pad_token, tokenizer.model_max_length, tokenizer.padding_side) == (None, 512, "right")
    messages = [record.getMessage() for record in caplog.records]
    assert f"{path}: pad_token=3 must be a token, or an object with content; assumed: None" in messages
    assert f"{path}: model_max_length='512' must be a positive number; assumed: 512" in messages
    assert f"{path}: padding_side='middle' must be 'left' or 'right'; assumed: None" in messages
