"""Models in stores: tensors are read from there in ranges, and only the other files are copied."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small_checkpoint import write_checkpoint
from stores import Store

from phi3_jax import (
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Tokenizer,
    convert_checkpoint,
    make_mesh,
)
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.errors import UserError
from phi3_jax.lora import find_model
from phi3_jax.sources.hub import resolve
from phi3_jax.storage.objects import RemoteFile
from phi3_jax.storage.urls import ChangedError, StorageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, in several shards."""
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "whole").mkdir()
    write_checkpoint(root / "whole")
    convert_checkpoint(root / "whole", root / "sharded", max_shard_size="100KB")
    return root / "sharded"


def parameters(model: Phi3ForCausalLM) -> dict[str, np.ndarray]:
    return {str(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}


def assert_equal_models(one: Phi3ForCausalLM, other: Phi3ForCausalLM) -> None:
    expected = parameters(other)
    assert parameters(one).keys() == expected.keys()
    for name, values in parameters(one).items():
        np.testing.assert_array_equal(values, expected[name], strict=True)


def test_loads_the_same_model(store: Store, folder: Path, cache: Path) -> None:
    url = store.put_folder("models/tiny", folder)
    model = Phi3ForCausalLM.from_pretrained(url)
    assert_equal_models(model, Phi3ForCausalLM.from_pretrained(folder))
    assert model.generation_config == Phi3ForCausalLM.from_pretrained(folder).generation_config
    assert not list(cache.rglob("*.safetensors"))
    tokenizer = Phi3Tokenizer.from_pretrained(url)
    assert tokenizer.encode("What is the capital?") == Phi3Tokenizer.from_pretrained(folder).encode(
        "What is the capital?"
    )
    assert Phi3Config.from_pretrained(url) == Phi3Config.from_pretrained(folder)


def test_divides_a_model_over_a_mesh(memory: Store, folder: Path) -> None:
    url = memory.put_folder("tiny", folder)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    assert_equal_models(
        Phi3ForCausalLM.from_pretrained(url, mesh=mesh), Phi3ForCausalLM.from_pretrained(folder, mesh=mesh)
    )


def test_loads_quantized_weights(memory: Store, folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder, tmp_path / "int8", "int8")
    url = memory.put_folder("int8", tmp_path / "int8")
    assert_equal_models(
        Phi3ForCausalLM.from_pretrained(url), Phi3ForCausalLM.from_pretrained(tmp_path / "int8")
    )


def test_reads_a_long_header(memory: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3_jax.checkpoint.safetensors.HEADER_BLOCK", 16)
    url = memory.put_folder("tiny", folder)
    assert_equal_models(Phi3ForCausalLM.from_pretrained(url), Phi3ForCausalLM.from_pretrained(folder))


def test_a_new_version_replaces_the_old_one(memory: Store, folder: Path, tmp_path: Path) -> None:
    url = memory.put_folder("tiny", folder)
    Phi3ForCausalLM.from_pretrained(url)
    before = fingerprint(resolve(url))
    assert set(before) > {path.name for path in folder.glob("*.safetensors")}
    (tmp_path / "new").mkdir()
    write_checkpoint(tmp_path / "new", num_hidden_layers=1)
    for path in folder.iterdir():
        memory.remove(f"tiny/{path.name}")
    memory.put_folder("tiny", tmp_path / "new")
    assert_equal_models(
        Phi3ForCausalLM.from_pretrained(url), Phi3ForCausalLM.from_pretrained(tmp_path / "new")
    )
    assert fingerprint(resolve(url)) != before


def test_gives_a_model_another_config(memory: Store, folder: Path, tmp_path: Path) -> None:
    path = resolve(memory.put_folder("tiny", folder))
    config = Phi3Config.from_pretrained(folder).replace(max_position_embeddings=8192)
    reconfigure_checkpoint(path, tmp_path / "longer", config)
    assert_equal_models(
        Phi3ForCausalLM.from_pretrained(tmp_path / "longer"), Phi3ForCausalLM.from_pretrained(folder)
    )


def test_converts_a_remote_model(memory: Store, folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(memory.put_folder("tiny", folder), tmp_path / "whole")
    assert_equal_models(
        Phi3ForCausalLM.from_pretrained(tmp_path / "whole"), Phi3ForCausalLM.from_pretrained(folder)
    )


def test_rejects_weights_that_change_while_they_are_read(
    memory: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = memory.put_folder("tiny", folder)
    read = RemoteFile.read
    count = 0

    def change(file: RemoteFile, pieces: list[tuple[int, memoryview]]) -> None:
        nonlocal count
        count += 1
        read(file, pieces)
        if count == 12:
            name = file.entry.name
            memory.put(f"tiny/{name}", (folder / name).read_bytes())

    monkeypatch.setattr(RemoteFile, "read", change)
    with pytest.raises(ChangedError, match=r"memory://.*/tiny/model-.*safetensors changed while it was read"):
        Phi3ForCausalLM.from_pretrained(url)


def test_rejects_broken_models(memory: Store, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"memory://.*none does not exist; give the URL of a model"):
        Phi3ForCausalLM.from_pretrained(f"{memory.url}/none")
    url = memory.put_folder("tiny", folder)
    shard = sorted(path.name for path in folder.glob("*.safetensors"))[1]
    memory.put(f"tiny/{shard}", (folder / shard).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"memory://.*/{shard} \(\d+ bytes\) is truncated"):
        Phi3ForCausalLM.from_pretrained(url)
    memory.put(f"tiny/{shard}", b"")
    with pytest.raises(CheckpointError, match=rf"{shard} \(0 bytes\) is truncated"):
        Phi3ForCausalLM.from_pretrained(url)
    memory.remove(f"tiny/{shard}")
    with pytest.raises(CheckpointError, match=f"lacks {shard}, which model.safetensors.index.json names"):
        Phi3ForCausalLM.from_pretrained(url)


def test_an_adapter_and_its_base_model(memory: Store, folder: Path) -> None:
    base = memory.put_folder("tiny", folder)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["o_proj"], "base_model_name_or_path": base}
    adapter = memory.put("adapter/adapter_config.json", json.dumps(config).encode())
    memory.put("adapter/adapter_model.safetensors", b"weights")
    paths = find_model(None, adapter.rpartition("/")[0], lambda: Path())
    assert paths.adapter is not None
    assert (paths.adapter / "adapter_model.safetensors").read_bytes() == b"weights"
    assert paths.adapter_record["adapter"] == f"{memory.url}/adapter"
    assert (paths.base / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_survives_a_store_that_fails_at_times(server: Store, folder: Path) -> None:
    url = server.put_folder("tiny", folder)
    assert server.proxy is not None
    first = len(server.proxy.requests)
    faults = {3: "503", 6: "cut", 9: "slow", 13: "cut"}
    server.proxy.fault = lambda number, path: faults.get(number - first)
    assert_equal_models(Phi3ForCausalLM.from_pretrained(url), Phi3ForCausalLM.from_pretrained(folder))


def test_says_that_a_store_refuses(server: Store, folder: Path) -> None:
    url = server.put_folder("tiny", folder)
    assert server.proxy is not None
    server.proxy.fault = lambda number, path: "403"
    with pytest.raises(StorageError, match=r"/tiny: the store refuses access .*; check the cred") as error:
        Phi3ForCausalLM.from_pretrained(url)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UserError)
