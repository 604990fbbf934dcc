"""Commands read from stores, with clear errors."""

import os
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint
from stores import Store
from typer.testing import CliRunner, Result

from phi3_jax.cli import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


def run(app: object, *arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))  # type: ignore[arg-type]


def test_reads_model_and_text_from_a_store(memory: Store, folder: Path, tmp_path: Path) -> None:
    url = memory.put_folder("model", folder)
    text = memory.put("text.txt", b"What is the capital of France? " * 9)
    (tmp_path / "text.txt").write_bytes(memory.get("text.txt"))
    options = ["--length", 32, "--dtype", "float32"]
    remote = run(evaluate.app, text, "--model", url, *options, "--cache-dir", tmp_path / "other")
    local = run(evaluate.app, tmp_path / "text.txt", "--model", folder, *options)
    assert remote.exit_code == local.exit_code == 0, remote.output
    assert "perplexity" in local.output
    assert [line for line in remote.stdout.splitlines() if "perplexity" in line] == [
        line for line in local.stdout.splitlines() if "perplexity" in line
    ]
    assert list((tmp_path / "other").rglob("text.txt"))
    assert os.environ["PHI3_JAX_CACHE"] == str(tmp_path / "cache")


def test_an_absent_file_is_one_clear_line(memory: Store) -> None:
    result = run(evaluate.app, f"{memory.url}/none.txt")
    assert result.exit_code == 2
    assert f"there is nothing at {memory.url}/none.txt" in " ".join(result.output.split())
