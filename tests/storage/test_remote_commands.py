"""Commands read from stores, with clear errors."""

import os
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint
from stores import Store
from typer.testing import CliRunner, Result

from phi3_jax.cli import evaluate, rope_compare, rope_inspect, rope_retrieve, rope_search
from phi3_jax.rope_lab.comparison import report as compare_report
from phi3_jax.rope_lab.inspection import report as inspect_report
from phi3_jax.rope_lab.retrieval import report as retrieval_report
from phi3_jax.rope_lab.search import results as search_results
from phi3_jax.storage.urls import list_entries


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


@pytest.mark.slow
def test_measurements_of_ropes_are_written_to_a_store(memory: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder, max_position_embeddings=32, original_max_position_embeddings=32)
    model, url = memory.put_folder("model", folder), f"{memory.url}/out"
    text = memory.put("text.txt", b"What is the capital of France? " * 40)
    common = ["--model", model, "--dtype", "float32", "--output"]
    compare = ["--text", text, "--lengths", "16,24", "--rope", "linear:factor=2"]
    search = ["--text", text, "--lengths", 64, "--iterations", 2, "--knots", 2]
    retrieve = ["--lengths", 300, "--depths", 0, "--trials", 1, "--max-new-tokens", 4, "--raw"]
    inspect = ["--text", text, "--lengths", "16,24", "--queries", 3]
    for app, options, names in (
        (rope_compare.app, compare, compare_report.FILES),
        (rope_inspect.app, inspect, inspect_report.FILES),
        (rope_search.app, search, search_results.FILES),
        (rope_retrieve.app, retrieve, retrieval_report.FILES),
    ):
        for _ in range(2):  # the second run measures nothing
            result = run(app, *options, *common, url)
            assert result.exit_code == 0, (result.output, result.exception)
            assert url in result.output
        written = {entry.name for entry in list_entries(url)}
        assert written == set(names) - {"model"}
        if "model" in names:
            assert memory.get("out/model/config.json") != memory.get("model/config.json")
        for name in written:
            memory.remove(f"out/{name}")
    for app, options in (
        (rope_compare.app, compare),
        (rope_search.app, search),
        (rope_retrieve.app, retrieve),
    ):
        assert "would write over the model" in str(run(app, *options, *common, model).exception)
