"""Commands that would write over what they read."""

from pathlib import Path
from typing import Any

import pytest

TEXT = '{"id": 1, "prompt": "abc"}\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(TEXT)
    (tmp_path / "symbolic.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    return path


@pytest.mark.parametrize("name", ["in.jsonl", "symbolic.jsonl", "hard.jsonl"])
@pytest.mark.parametrize(
    "words",
    [
        ("batch", "--input", "in.jsonl", "--overwrite", "--output"),
        ("batch", "--input", "in.jsonl", "--output", "out.jsonl", "--stats"),
        ("evaluate", "in.jsonl", "--output"),
    ],
    ids=["batch", "stats", "evaluate"],
)
def test_keeps_the_input(
    run: Any,
    model_folder: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    name: str,
) -> None:
    monkeypatch.chdir(source.parent)
    before = {path.name for path in source.parent.iterdir()}
    result = run(*words, name, "--model", model_folder)
    option = words[-1]
    assert (result.code, result.out) == (1, "")
    assert f"phi3-jax: {option} {name} is also " in result.err
    assert result.err.endswith(f"; choose another {option}\n")
    assert source.read_text() == TEXT
    assert {path.name for path in source.parent.iterdir()} == before


def test_keeps_the_model(run: Any, model_folder: Path, source: Path) -> None:
    weights, config = model_folder / "model.safetensors", model_folder / "config.json"
    before = weights.read_bytes(), config.read_bytes()
    commands = [
        ("batch", "--input", source, "--output", weights),
        ("evaluate", source, "--output", config),
        ("plan", "--topology", "v5e:1x1", "--json", config),
    ]
    for words in commands:
        result = run(*words, "--model", model_folder)
        assert result.code == 1
        assert "is in --model; choose another" in result.err
    assert (weights.read_bytes(), config.read_bytes()) == before


def test_rejects_a_device(run: Any, model_folder: Path, source: Path) -> None:
    result = run("batch", "--input", source, "--output", "/dev/null", "--model", model_folder)
    assert (result.code, result.err) == (
        1,
        "phi3-jax: --output /dev/null is not a regular file; choose a file's name\n",
    )
