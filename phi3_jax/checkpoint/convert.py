"""From one checkpoint to another without a model in between: cast, shard, GGUF to safetensors."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.load import open_checkpoint
from phi3_jax.checkpoint.safetensors import atomic_directory, cast, write_tensors
from phi3_jax.checkpoint.source import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".onnx")


def convert_checkpoint(
    source_path: str | os.PathLike[str],
    destination_dir: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Rewrites a checkpoint as a directory in Hugging Face's layout: safetensors, config, tokenizer.

    One shard at a time is held in memory. The destination appears whole or not at all.

    Args:
        source_path: a directory in Hugging Face's layout or a GGUF file.
        destination_dir: another directory; weights in it are replaced.
        dtype: to cast the tensors to; None keeps each as it is.
        max_shard_size: the largest file, such as "5GB".

    Raises:
        CheckpointError: the source is not a checkpoint, or the destination cannot be written.
    """
    source_path, destination = Path(source_path), Path(destination_dir)
    if destination.exists() and (not destination.is_dir() or destination.samefile(source_path)):
        raise CheckpointError(f"{destination} cannot be the destination; name another directory")
    source, config = open_checkpoint(source_path)
    kind = None if dtype is None else np.dtype(jnp.dtype(dtype))
    if kind is not None and not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"dtype={dtype} is not floating point; use float32, bfloat16 or float16")
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
            for path in source_path.iterdir():
                if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and ".safetensors" not in path.name:
                    shutil.copyfile(path, work / path.name)
        config.replace(extra=extra).save_pretrained(work)
