"""Finds and loads the model of a command, and keeps compiled programs."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.checkpoint.safetensors import weight_files
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.lora import ModelPaths, find_model, open_model
from phi3_jax.parallel.distributed import run_everywhere
from phi3_jax.parallel.messages import tell
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.cache_folder import keep_compiled_programs
from phi3_jax.storage.objects import LocalFile
from phi3_jax.storage.targets import Target, local_target
from phi3_jax.storage.urls import list_entries


def load_pipeline(
    paths: ModelPaths,
    dtype: str,
    cache_dir: Path | None,
    mesh: Mesh | None = None,
    rope: str | None = None,
    quantize: str | None = None,
) -> Pipeline:
    """Loads the model of `model_paths`, with what `--rope` and `--quantize` name.

    An error in one process is raised in all of them.
    """
    keep_compiled_programs(cache_dir)

    def load() -> Pipeline:
        checkpoint = open_model(paths)
        config = None if rope is None else parse_rope(rope).config_to_save(checkpoint.config)
        options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "quantization": quantize}
        return Pipeline.load(checkpoint, config=config, adapter=paths.adapter, **options)

    return run_everywhere(load)


def config_with(paths: ModelPaths, rope: str) -> Phi3Config:
    """Returns a model's config with the rope that `--rope` names."""
    return parse_rope(rope).config_to_save(open_model(paths).config)


def weight_bytes(target: Target) -> int:
    """Returns the bytes of the files that have a checkpoint's weights."""
    path = local_target(target)
    if path is None:
        entries = list_entries(os.fspath(target))
        return sum(entry.size for entry in entries if entry.name.endswith(".safetensors"))
    if path.is_file():
        return path.stat().st_size
    files = list(weight_files(path).values()) or [LocalFile(each) for each in path.glob("*.gguf")]
    return sum(file.size for file in files)


def model_paths(model: str | None, adapter: str | None, cache_dir: Path | None) -> ModelPaths:
    """Returns the paths of what `--model` and `--adapter` name, after fetching it if necessary.

    An error in one process is raised in all of them.
    """
    return run_everywhere(lambda: find_model(model, adapter, lambda: default_model(cache_dir, progress=tell)))
