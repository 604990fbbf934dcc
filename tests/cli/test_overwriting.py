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


def test_a_comparison_keeps_each_of_its_files(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi3_jax.cli.bench_finetune.REQUIRED", [])
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text("text,label\n")
    words = ("bench-finetune", "--train-file", "one.csv,two.csv", "--whole-run", "--output", "one.csv")
    result = run(*words)
    assert result.code == 1
    assert "phi3-jax: --output one.csv is also the data one.csv; choose another --output" in result.err


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
    result = run("chat", "--model", model_folder, stdin=f"/save {config}\n")
    assert f"{config} exists and is no saved conversation; choose another name" in result.err
    assert (weights.read_bytes(), config.read_bytes()) == before


def plain(text: str) -> str:
    """Returns an error without its box."""
    return " ".join(text.replace("│", " ").split())


ROPES = {
    "compare": ("--lengths", "8"),
    "critical": ("--length", "5000"),
    "search": ("--lengths", "512"),
    "retrieve": ("--lengths", "64"),
    "inspect": ("--lengths", "8", "--queries", "2"),
}


@pytest.mark.parametrize("command", ROPES)
def test_rope_commands_keep_the_model_and_the_text(
    run: Any, model_folder: Path, tmp_path: Path, command: str
) -> None:
    before = {path.name for path in model_folder.iterdir()}
    (tmp_path / "state.json").write_text("a text")
    (tmp_path / "link").symlink_to(model_folder)
    words = ("rope", command, *ROPES[command], "--model", model_folder, "--text", tmp_path / "state.json")
    for output in (model_folder, tmp_path / "link"):
        result = run(*words, "--output", output)
        assert f"--output {output} would write over the model {output}; choose another --output" in result.err
    result = run(*words, "--output", tmp_path)
    assert "state.json is also --text; choose another --output's state.json" in result.err
    if command == "search":
        (tmp_path / "model").symlink_to(model_folder)
        result = run(*words, "--output", tmp_path)
        assert f"would write over the model {tmp_path / 'model'}" in result.err
    assert {path.name for path in model_folder.iterdir()} == before
    assert (tmp_path / "state.json").read_text() == "a text"


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "m"),
        ("rope", "compare", "--text", "t", "--lengths", "8", "--output"),
        ("rope", "critical", "--text", "t", "--length", "8", "--output"),
        ("rope", "search", "--text", "t", "--lengths", "8", "--output"),
        ("rope", "retrieve", "--lengths", "8", "--output"),
        ("rope", "inspect", "--text", "t", "--lengths", "8", "--output"),
        ("finetune", "--output-dir"),
    ],
    ids=" ".join,
)
def test_rejects_an_empty_name(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words, "")
    assert result.code == 2
    assert "the name is empty; write . for the current directory" in plain(result.err)
    (tmp_path / "file").touch()
    result = run(*words, "file")
    assert result.code == 2
    assert "'file' is a file; name a directory" in plain(result.err)


def test_rejects_a_device(run: Any, model_folder: Path, source: Path) -> None:
    result = run("batch", "--input", source, "--output", "/dev/null", "--model", model_folder)
    assert (result.code, result.err) == (
        1,
        "phi3-jax: --output /dev/null is not a regular file; choose a file's name\n",
    )
