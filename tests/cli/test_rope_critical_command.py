"""The options of `phi3-jax rope critical`."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def words(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    """The command for a text that it can use."""
    text = tmp_path / "text.txt"
    text.write_text("What is the capital of France? " * 300)
    options = ("--length", 512, "--trained-length", 200, "--output", tmp_path / "out", "--batch-size", 2)
    return "rope", "critical", "--model", model_folder, "--text", text, *options, "--dtype", "float32"


def test_prints_the_critical_pair(run: Any, words: tuple[Any, ...], tmp_path: Path) -> None:
    options = ("--needles", 1, "--seed", 3, "--skip-tokens", 5, "--candidates", "2,3", "--pairs", "4")
    result = run(*words, *options)
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "out" / "critical.json").read_text())
    pair = content["critical_pair"]
    assert f"out: critical pair {pair}, in theory {content['theoretical_pair']}\n" in result.out
    best = {4: "those from 4 on stretched, and earlier ones plain", 5: "all of them plain"}
    crossing = content["crossing_of_single_pairs"]
    assert f"effects of single pairs added up, the loss would be least with {best[crossing]}\n" in result.err
    assert [each["pair"] for each in content["single_pairs"]] == [4]
    assert {each["pair"] for each in content["candidates"]} == {2, 3}
    asked = content["asked"]
    assert [asked[name] for name in ("kind", "needles", "seed", "skip_tokens")] == ["needle", 1, 3, 5]
    assert asked["trained_length"] == 200


def test_rejects_odd_numbers(run: Any, words: tuple[Any, ...], tmp_path: Path) -> None:
    for options, message in (
        (("--candidates", "1,x"), "--candidates 1,x: 'x' is not a whole number"),
        (("--pairs", "-1"), "--pairs -1: -1 must be at least 0"),
        (("--pairs", "77"), "pairs: 77 must be from 0 to 5, the model's last pair of dims"),
        (("--trained-length", "512"), "length=512 must be more than the 512 tokens"),
    ):
        result = run(*words, *options)
        assert (result.code, message in result.err) == (1, True), result.err
    assert not (tmp_path / "out").exists()
