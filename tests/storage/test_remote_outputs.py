"""Outputs in stores appear when they are complete, and replace what was there."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import write_checkpoint
from stores import Store
from typer.testing import CliRunner, Result

from phi3_jax import GenerationConfig, Phi3Config, Phi3ForCausalLM, Phi3Tokenizer, convert_checkpoint
from phi3_jax.calibration import CalibrationOptions, calibrate_checkpoint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.cli import convert, evaluate, quantize
from phi3_jax.lora import add_lora, load_adapters, save_adapters
from phi3_jax.storage import outputs
from phi3_jax.storage.outputs import exchanging, replacing, temporary_folder, write_text
from phi3_jax.storage.urls import StorageError, list_entries

PATTERN = re.compile(r"weights-\d|config")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


def names(url: str) -> list[str]:
    return [entry.name for entry in list_entries(url)]


def fill(store: Store, **files: str) -> str:
    """Writes files with `exchanging` and returns the URL of their folder."""
    url = f"{store.url}/out"
    with exchanging(f"{url}/", config="config", replaced=PATTERN) as work:
        for name, text in files.items():
            (work / name.replace("_", "-")).write_text(text)
    return url


def test_writes_a_file(store: Store, cache: Path) -> None:
    write_text(f"{store.url}/results.json", "first")
    write_text(f"{store.url}/results.json", "second")
    assert store.get("results.json") == b"second"
    assert names(store.url) == ["results.json"]
    assert list((cache / "outputs").iterdir()) == []


def test_an_error_leaves_the_file(memory: Store, cache: Path) -> None:
    memory.put("results.json", b"before")
    with pytest.raises(FileNotFoundError), replacing(f"{memory.url}/results.json") as work:
        (work.parent / "absent" / "half").write_text("half")
    assert memory.get("results.json") == b"before"
    assert list((cache / "outputs").iterdir()) == []


def test_deletes_the_folders_of_killed_processes(cache: Path) -> None:
    with temporary_folder() as mine:
        number = str(os.getpid())
        left = mine.with_name(mine.name.replace(number, "4194305"))  # above the greatest number of Linux
        other = mine.with_name(f"other-{left.name}")
        left.mkdir()
        other.mkdir()
        with temporary_folder():
            assert mine.exists()
    assert list((cache / "outputs").iterdir()) == [other]


def test_a_directory_replaces_its_own_files(store: Store) -> None:
    url = fill(store, config="1", weights_1="a", weights_2="b")
    store.put("out/notes", b"mine")
    store.put("out/inner/weights-3", b"theirs")
    fill(store, config="2", weights_2="c", vocabulary="v")
    assert names(url) == ["config", "notes", "vocabulary", "weights-2"]
    assert (store.get("out/config"), store.get("out/weights-2")) == (b"2", b"c")
    assert store.get("out/inner/weights-3") == b"theirs"


def test_a_directory_without_config_is_one_that_is_not_complete(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is the last thing that a killed process does, there is no mixture with a config."""
    put, remove = outputs.put, outputs._remove
    calls: list[tuple[str, list[str]]] = []

    def watch(action: Any, name: str) -> Any:
        def run(*arguments: Any) -> None:
            action(*arguments)
            calls.append((name, names(f"{memory.url}/out")))

        return run

    fill(memory, config="1", weights_1="a")
    monkeypatch.setattr(outputs, "put", watch(put, "put"))
    monkeypatch.setattr(outputs, "_remove", watch(remove, "remove"))
    fill(memory, config="2", weights_2="b")
    assert calls == [
        ("remove", ["weights-1"]),
        ("remove", []),
        ("put", ["weights-2"]),
        ("put", ["config", "weights-2"]),
    ]


def test_says_at_the_start_that_a_store_cannot_be_written(server: Store) -> None:
    assert server.proxy is not None
    server.proxy.fault = lambda number, path: "403"
    with (
        pytest.raises(StorageError, match="the store refuses access"),
        exchanging(f"{server.url}/out", config="config", replaced=PATTERN),
    ):
        raise AssertionError("the block must not run")


def test_says_that_an_upload_is_not_whole(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "find_entry", lambda url: None)
    with pytest.raises(StorageError, match="does not have all that was written; try again"):
        write_text(f"{memory.url}/results.json", "text")


def test_saves_a_model_its_adapters_and_its_tokenizer(store: Store, folder: Path, tmp_path: Path) -> None:
    model = Phi3ForCausalLM.from_pretrained(folder)
    url = f"{store.url}/saved"
    model.save_pretrained(url, max_shard_size="100KB")
    assert Phi3Tokenizer.from_pretrained(folder).save_pretrained(url)[0].startswith(f"{url}/")
    again = Phi3ForCausalLM.from_pretrained(url)
    ids = [Phi3Tokenizer.from_pretrained(url).encode("What is the capital?")]
    np.testing.assert_array_equal(again(np.array(ids)).logits, model(np.array(ids)).logits)
    model.save_pretrained(url)
    assert [name for name in names(url) if "safetensors" in name] == ["model.safetensors"]
    assert Phi3Config.from_pretrained(url).save_pretrained(f"{url}/config") == f"{url}/config/config.json"
    assert GenerationConfig().save_pretrained(f"{url}/config") == f"{url}/config/generation_config.json"
    assert names(f"{url}/config") == ["config.json", "generation_config.json"]
    adapted = add_lora(model, rank=2, rngs=1)
    save_adapters(adapted, f"{store.url}/adapter", base_model=url)
    load_adapters(again, f"{store.url}/adapter")
    assert names(f"{store.url}/adapter") == ["adapter_config.json", "adapter_model.safetensors"]


def test_converts_and_quantizes(memory: Store, folder: Path) -> None:
    convert_checkpoint(folder, f"{memory.url}/converted")
    quantize_checkpoint(f"{memory.url}/converted", f"{memory.url}/int8", "int8")
    assert "config.json" in names(f"{memory.url}/int8")
    assert not any(name.startswith(".") for name in names(f"{memory.url}/int8"))
    Phi3ForCausalLM.from_pretrained(f"{memory.url}/int8")
    with pytest.raises(CheckpointError, match=r"memory://.*/converted is the checkpoint itself"):
        quantize_checkpoint(f"{memory.url}/converted", f"{memory.url}/converted/", "int8")


def test_calibrates(memory: Store, folder: Path, tmp_path: Path, cache: Path) -> None:
    tokens = np.random.default_rng(0).integers(5, 280, 96)
    options = CalibrationOptions(3, 32)
    calibrate_checkpoint(folder, f"{memory.url}/int4", tokens, "int4:group_size=none", options)
    calibrate_checkpoint(folder, tmp_path / "int4", tokens, "int4:group_size=none", options)
    assert memory.get("int4/model.safetensors") == (tmp_path / "int4" / "model.safetensors").read_bytes()
    assert not list(cache.rglob("*.calibration"))


def test_commands_write_to_a_store(memory: Store, folder: Path, tmp_path: Path) -> None:
    def run(app: Any, *arguments: object) -> Result:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, (result.output, result.exception)
        return result

    assert f"{memory.url}/converted: 0.00 GB" in run(convert.app, folder, f"{memory.url}/converted").output
    run(quantize.app, f"{memory.url}/converted", f"{memory.url}/int8", "--weights", "int8")
    (tmp_path / "text.txt").write_text("What is the capital of France? " * 9)
    options = ["--model", f"{memory.url}/int8", "--length", 32, "--output", f"{memory.url}/result.json"]
    run(evaluate.app, tmp_path / "text.txt", *options)
    assert b'"perplexity"' in memory.get("result.json")
