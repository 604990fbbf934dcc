"""Fingerprints of models, by which a resumed run recognises its model."""

import hashlib
from pathlib import Path


def fingerprint(path: Path) -> str:
    """Returns a digest of small files' contents and of the weights' sizes and times."""
    digest = hashlib.blake2b(digest_size=16)
    for file in [path] if path.is_file() else sorted([path / "config.json", *path.glob("tokenizer*")]):
        if file.suffix != ".gguf":
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        digest.update(repr((file.name, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    return digest.hexdigest()
