"""From one checkpoint to another without a model in between: cast, shard, GGUF to safetensors."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.atomic import CONFIG, atomic_directory
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.safetensors import cast, parameter_dtype, write_tensors
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.config.model_config import Phi3Config

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")


def convert_checkpoint(
    source_path: str | os.PathLike[str],
    destination_dir: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    config: Phi3Config | None = None,
) -> None:
    """Rewrites a checkpoint as a directory in Hugging Face's layout: safetensors, config, tokenizer.

    One tensor at a time is held in memory. The destination appears whole or not at all.

    Args:
        source_path: a directory in Hugging Face's layout or a GGUF file.
        destination_dir: another directory; weights in it are replaced.
        dtype: to cast the tensors to; None keeps each as it is.
        max_shard_size: the largest file, such as "5GB".
        config: written in place of the checkpoint's own.

    Raises:
        CheckpointError: the source is not a checkpoint, or the destination cannot be written.
        ValueError: a dtype that parameters cannot have, or a size that is none.
    """
    source_path, destination = Path(source_path), Path(destination_dir)
    kind = None if dtype is None else parameter_dtype(dtype)
    source, own_config = open_checkpoint(source_path)
    config = config or own_config
    if destination.exists() and destination.samefile(source_path):
        raise CheckpointError(f"{destination} is the checkpoint itself; name another directory")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; name a directory")
    stored = kind or source.dtype(next(iter(source.names())))
    extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"} | {
        "dtype": str(stored)
    }
    with atomic_directory(destination) as work:
        write_tensors(cast(source, kind), work, max_shard_size)
        if isinstance(source, GGUFSource):
            for name, content in source.tokenizer_files().items():
                text = (
                    content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
                )
                (work / name).write_text(text, encoding="utf-8")
        else:
            for path in files_beside_weights(source_path):
                shutil.copyfile(path, work / path.name)
        config.replace(extra=extra).save_pretrained(work)


def files_beside_weights(directory: Path) -> Iterator[Path]:
    """What belongs to a checkpoint besides its weights and its config: the tokenizer above all."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != CONFIG and not path.name.endswith(WEIGHT_SUFFIXES):
            yield path
