"""JSON that comes from outside."""

import json
from pathlib import Path

import pytest

from phi3_jax import Phi3Config
from phi3_jax.runs.text import parse_json, read_json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "a.json is not valid JSON: it has the key 'a' twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "it has the key 'a' twice"),
        ('{"a": }', "a.json is not valid JSON: Expecting value at line 1 column 7"),
        (b'"\xff"', "a.json is not valid UTF-8: .* at byte 1"),
        ("[" * 100_000, "a.json is not valid JSON: it is nested too deeply"),
        ("[" * 101 + "]" * 101, "a.json is not valid JSON: it is nested too deeply, in more than 100 levels"),
        ('{"a":' * 101 + "1" + "}" * 101, "it is nested too deeply"),
        ("1" * 5000, "a.json is not valid JSON: Exceeds the limit"),
    ],
)
def test_names_errors(content: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(content, "a.json")


def test_reads_what_is_wide_or_within_the_limit() -> None:
    wide = [[[1], {"a": [2]}]] * 500
    assert parse_json(json.dumps(wide), "a.json") == wide
    assert parse_json("[" * 100 + "]" * 100, "a.json")
    assert parse_json("\ufeff[]", "a.json") == []


def test_reads_equal_keys_of_different_objects(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": {"a": 2}}]')
    assert read_json(tmp_path / "a.json") == [{"a": 1}, {"a": {"a": 2}}]


def test_config_with_a_key_twice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "model_type": "phi3", "hidden_size": 128}')
    with pytest.raises(
        ValueError, match=r"config\.json is not valid JSON: it has the key 'hidden_size' twice"
    ):
        Phi3Config.from_pretrained(tmp_path)
