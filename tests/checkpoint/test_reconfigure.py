"""A checkpoint under another config keeps its weights, and transformers computes the same from it."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from reference import LONG, Reference, distance, pair, run, run_theirs, small_config

from phi3_jax import CheckpointError, Phi3Config, Phi3ForCausalLM, convert_checkpoint
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint

ENTRY = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": LONG, "attention_factor": 1.07}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    ours, _ = pair("causal", small_config(), folder)
    ours.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def stretched(source: Path) -> Phi3Config:
    return Phi3Config.from_pretrained(source).replace(rope_scaling=ENTRY, max_position_embeddings=256)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_links_weights_and_matches_transformers(source, tmp_path):
    reconfigure_checkpoint(source, tmp_path / "out", stretched(source))
    before, after = contents(source), contents(tmp_path / "out")
    assert after.keys() == before.keys() - {"pytorch_model.bin"}
    assert [name for name in after if after[name] != before[name]] == ["config.json"]
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(path.samefile(tmp_path / "out" / path.name) for path in shards)
    assert not (source / "tokenizer.json").samefile(tmp_path / "out" / "tokenizer.json")

    theirs = Reference("causal", stretched(source), tmp_path / "out")
    ours = Phi3ForCausalLM.from_pretrained(tmp_path / "out")
    for length in (64, 65):  # both sides of the switch
        ids = np.random.default_rng(length).integers(4, 96, (1, length))
        expected = run_theirs(theirs, ids, None).logits
        assert distance(run(ours, input_ids=ids).logits, expected) <= 1e-5
    plain = run(Phi3ForCausalLM.from_pretrained(source), input_ids=ids).logits
    assert distance(plain, expected) > 1e-2


def test_copies_weights_where_links_are_impossible(source, tmp_path, monkeypatch):
    config = stretched(source)
    reconfigure_checkpoint(source, tmp_path / "out", config)
    linked = contents(tmp_path / "out")

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    reconfigure_checkpoint(source, tmp_path / "out", config)
    assert contents(tmp_path / "out") == linked
    shard = next(source.glob("*.safetensors"))
    assert not shard.samefile(tmp_path / "out" / shard.name)


def test_follows_symbolic_links_of_the_hubs_cache(source, tmp_path):
    hub = tmp_path / "models--org--name" / "snapshots" / "1234"
    hub.mkdir(parents=True)
    source.rename(tmp_path / "models--org--name" / "blobs")
    for path in (tmp_path / "models--org--name" / "blobs").iterdir():
        (hub / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    reconfigure_checkpoint(hub, tmp_path / "out", stretched(hub))
    found = list((tmp_path / "out").iterdir())
    assert found
    assert not any(path.is_symlink() for path in found)


@pytest.mark.parametrize("name", ["notes.txt", "other.safetensors"])
@pytest.mark.parametrize("place", ["models--org--name/snapshots/1234", "plain"])
def test_rejects_links_to_files_elsewhere(source, tmp_path, name, place):
    folder = tmp_path / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.rename(folder)
    (tmp_path / "secret").write_text("mine")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=rf"{name} is a link to .*secret, which is not in the checkpoint"
    ):
        reconfigure_checkpoint(folder, tmp_path / "out", stretched(folder))
    if name == "notes.txt":
        with pytest.raises(CheckpointError, match="put a copy of the file in its place, or remove the link"):
            convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "config.json")  # within the checkpoint
    convert_checkpoint(folder, tmp_path / "out")


def test_rejects_impossible_destinations(source, tmp_path):
    config = stretched(source)
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        reconfigure_checkpoint(source, source, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; name a directory"):
        reconfigure_checkpoint(source, tmp_path / "file", config)
    assert (tmp_path / "file").read_text() == ""


def test_convert_takes_a_config(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", config=stretched(source))
    written = Phi3Config.from_pretrained(tmp_path / "out")
    assert written.rope_scaling == stretched(source).rope_scaling
    assert written.max_position_embeddings == 256
