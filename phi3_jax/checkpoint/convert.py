"""Converts a checkpoint without building a model: casts, shards, turns GGUF into safetensors."""

import os
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.companions import CHECKPOINT_FILES
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.quantization_config import without_quantization
from phi3_jax.checkpoint.safetensors import cast, parameter_dtype, write_tensors
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.config.model_config import CONFIG_NAME, Phi3Config
from phi3_jax.config.rope_argument import as_longrope
from phi3_jax.sources.hub import local_model
from phi3_jax.storage.fetch import display_name
from phi3_jax.storage.outputs import exchanging
from phi3_jax.storage.targets import Target, local_target


def convert_checkpoint(
    source_path: str | os.PathLike[str],
    destination_dir: Target,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    config: Phi3Config | None = None,
) -> None:
    """Writes a checkpoint as a directory in Hugging Face's layout: safetensors, config, tokenizer.

    Llama's and Mistral's tensors are fused to Phi-3's, and their ropes written as longrope with the same
    frequencies. It holds one tensor at a time in memory. The destination appears whole or not at all.

    Args:
        source_path: a directory in Hugging Face's layout or a GGUF file, or the URL of one.
        destination_dir: another directory or its URL; a checkpoint in it is replaced, other files stay.
        dtype: the tensors' new dtype; None keeps each as it is.
        max_shard_size: the largest file, such as "5GB".
        config: written in place of the checkpoint's own.

    Raises:
        CheckpointError: the source is not a checkpoint, or the destination has no name or cannot be written.
        UserError: the dtype is not one of parameters, or the size cannot be read.
    """
    source_path = local_model(source_path)
    kind = None if dtype is None else parameter_dtype(dtype)
    source, own_config = open_checkpoint(source_path)
    destination = check_destination(source_path, destination_dir)
    config = without_quantization(config or as_longrope(own_config))  # the scaling that transformers reads
    stored = kind or source.dtype(next(iter(source.names())))
    extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"}
    with exchanging(destination, config=CONFIG_NAME, replaced=CHECKPOINT_FILES) as work:
        write_tensors(cast(source, kind), work, max_shard_size)
        source.check_unchanged()
        source.write_companions(work)
        config.replace(extra=extra | {"dtype": str(stored)}).save_pretrained(work)


def check_destination(source_path: Path, destination_dir: Target) -> Path | str:
    """Returns the directory to write, or its URL, which is not the checkpoint that is read.

    Raises:
        CheckpointError: it is, or its name is empty or that of a file.
    """
    if not os.fspath(destination_dir):
        raise CheckpointError("the destination's name is empty; write . for the current directory")
    destination = local_target(destination_dir)
    if destination is None:
        url = os.fspath(destination_dir).rstrip("/")
        if display_name(source_path) == url:
            raise CheckpointError(f"{url} is the checkpoint itself; name another directory")
        return url
    if destination.exists() and destination.samefile(source_path):
        raise CheckpointError(f"{destination} is the checkpoint itself; name another directory")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; name a directory")
    return destination
