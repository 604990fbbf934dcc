"""Commands read from stores; they refuse to write there, and say so."""

from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint
from stores import Store
from typer.testing import CliRunner, Result

from phi3_jax import GenerationConfig, Phi3Config, Phi3Tokenizer, convert_checkpoint
from phi3_jax.cli import convert, evaluate
from phi3_jax.errors import UserError


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


def test_an_absent_file_is_one_clear_line(memory: Store) -> None:
    result = run(evaluate.app, f"{memory.url}/none.txt")
    assert result.exit_code == 2
    assert f"there is nothing at {memory.url}/none.txt" in " ".join(result.output.split())


@pytest.mark.parametrize("url", ["gs://bucket/out", "memory://out"])
def test_refuses_to_write_to_a_store(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = "is a URL, and results are written to local paths"
    for save in (
        lambda: convert_checkpoint(folder, url),
        lambda: Phi3Config.from_pretrained(folder).save_pretrained(url),
        lambda: GenerationConfig().save_pretrained(url),
        lambda: Phi3Tokenizer.from_pretrained(folder).save_pretrained(url),
    ):
        with pytest.raises(UserError, match=message):
            save()
    for app, *arguments in (
        (convert.app, folder, url),
        (evaluate.app, folder / "config.json", "--model", folder, "--output", f"{url}.json"),
    ):
        result = run(app, *arguments)
        assert message in " ".join([result.output, str(result.exception)])
    assert list(tmp_path.iterdir()) == []
