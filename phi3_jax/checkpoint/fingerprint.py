"""Fingerprints of models, by which a resumed run recognises its model."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from phi3_jax.checkpoint.safetensors import weight_files
from phi3_jax.config.generation_config import GENERATION_CONFIG_NAME
from phi3_jax.config.model_config import CONFIG_NAME
from phi3_jax.storage.objects import LocalFile, RemoteFile
from phi3_jax.tokenizer import TOKENIZER_FILES

_READ = (CONFIG_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_FILES)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LENGTH = 16


def fingerprint(path: Path) -> dict[str, str]:
    """Returns a digest of each file that a model's results follow from, by the file's name.

    Weights are read whole, since a file may change within its size and time; those in the Hub's cache are
    named by their digest already, and those in a store by its version of them.
    """
    files = [path] if path.is_file() else [path / name for name in _READ if (path / name).is_file()]
    if not path.is_dir():
        return digests(files)
    weights = weight_files(path).values()
    remote = {file.name: file.entry.version for file in weights if isinstance(file, RemoteFile)}
    local = [file.path for file in weights if isinstance(file, LocalFile)]
    if not remote:
        local = sorted(local) or sorted(path.glob("*.gguf"))
    return digests([*files, *local]) | remote


def digests(files: Sequence[Path]) -> dict[str, str]:
    """Returns a digest of each file, by its name."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip([file.name for file in files], pool.map(_digest, files), strict=True))


def _digest(path: Path) -> str:
    file = path.resolve()
    if file.parent.name == "blobs" and _SHA256.fullmatch(file.name):
        return file.name[:_LENGTH]
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:_LENGTH]
