"""Opens a checkpoint on disk."""

from pathlib import Path
from typing import NamedTuple

from phi3_jax.checkpoint.composed import compose
from phi3_jax.checkpoint.gguf import GGUFDirectory, GGUFSource
from phi3_jax.checkpoint.quantization_config import quantization_entry, without_quantization
from phi3_jax.checkpoint.quantized import QuantizedSource
from phi3_jax.checkpoint.safetensors import INDEX, SafetensorsSource, weight_files
from phi3_jax.checkpoint.source import CheckpointError, CheckpointSource
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.runs.json_values import RUN
from phi3_jax.sources.hub import ADAPTER_CONFIG


class Checkpoint(NamedTuple):
    """An opened checkpoint: its headers are read, its tensors are not."""

    source: CheckpointSource
    config: Phi3Config
    """Without `quantization_config`: the source knows which tensors are quantized."""


def open_checkpoint(path: Path | Checkpoint) -> Checkpoint:
    """Opens a directory in Hugging Face's layout or a GGUF file; returns an open checkpoint as it is.

    A directory without safetensors may have its weights in one GGUF file.

    Raises:
        CheckpointError: the path is not a checkpoint, or its headers are broken.
    """
    if isinstance(path, Checkpoint):
        return path
    if path.suffix == ".gguf" and not path.is_dir():
        gguf = GGUFSource(path)
        try:
            return Checkpoint(gguf, Phi3Config.from_dict(gguf.config_dict(), path))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if not path.is_dir():
        problem = "is a file; name its directory, or a .gguf file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {problem}")
    if (path / ADAPTER_CONFIG).is_file() and not any(name.startswith("model") for name in weight_files(path)):
        raise CheckpointError(f"{path} holds adapters and no model; give it as the adapter (--adapter)")
    if (path / RUN).is_file() and not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is an unfinished run of finetune, which has no model yet; its command finishes it"
        )
    try:
        config = Phi3Config.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}") from error
    entry = quantization_entry(config)
    source: CheckpointSource
    if entry is not None:
        source = QuantizedSource(path, entry, config)
    elif (file := gguf_file(path)) is not None:
        if config.model_type != Phi3Config.model_type:
            raise CheckpointError(
                f"{file}: config.json has model_type={config.model_type!r}, which llama.cpp and its files do "
                "not have; use a checkpoint of safetensors"
            )
        source = GGUFDirectory(file)
    else:
        source = SafetensorsSource(path)
    config = without_quantization(config)
    return Checkpoint(compose(source, config), config)


def gguf_file(directory: Path) -> Path | None:
    """Returns the file with the weights of a directory that has no safetensors.

    Raises:
        CheckpointError: there are several.
    """
    if weight_files(directory) or (directory / INDEX).is_file():
        return None
    files = sorted(directory.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{directory} has several .gguf files ({names}); name one of them")
    return files[0] if files else None


def has_gguf_weights(path: Path) -> bool:
    """Whether a checkpoint, a directory or a file, has its weights in a GGUF file."""
    return path.is_file() or gguf_file(path) is not None


def read_generation_config(source: CheckpointSource, config: Phi3Config) -> GenerationConfig:
    """Returns the checkpoint's generation settings; if it has none, those of its `config`.

    Raises:
        CheckpointError: its generation_config.json is broken.
    """
    try:
        return source.generation_config() or GenerationConfig.from_model(config)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
