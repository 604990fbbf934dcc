"""A fingerprint covers every file that a model's results follow from."""

from pathlib import Path

from small_checkpoint import write_checkpoint

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.storage.resume import differences


def test_each_file_counts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "README.md").write_text("a model")
    before = fingerprint(tmp_path)
    assert {"config.json", "generation_config.json", "chat_template.jinja"} < before.keys()
    assert {"tokenizer_config.json", "tokenizer.json", "model.safetensors"} < before.keys()
    assert "README.md" not in before
    for name, digest in before.items():
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + b"#")
        changed = fingerprint(tmp_path)
        assert changed[name] != digest
        assert [each.partition(": ")[0] for each in differences({"files": before}, {"files": changed})] == [
            f"files.{name}"
        ]
        (tmp_path / name).write_bytes(content)
    assert fingerprint(tmp_path) == before
    (tmp_path / "chat_template.jinja").unlink()
    (message,) = differences(before, fingerprint(tmp_path))
    assert message.startswith("chat_template.jinja: ")
    assert message.endswith(" -> None")


def test_a_copy_and_the_hubs_cache_have_the_same(tmp_path: Path) -> None:
    digest = "64ec88ca00b268e5ba1a35678a1b5316d212f4f366b2477232534a8aeca37f3c"  # of "Hello world"
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model.safetensors").write_text("Hello world")
    folder = tmp_path / "models--org--name" / "snapshots" / "1234"
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    (folder.parents[1] / "blobs" / digest).write_text("is not read")
    (folder / "model.safetensors").symlink_to(Path("..") / ".." / "blobs" / digest)
    assert fingerprint(folder) == fingerprint(tmp_path / "copy") == {"model.safetensors": digest[:16]}


def test_a_file_alone(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert list(fingerprint(tmp_path / "model.gguf")) == ["model.gguf"]
