"""Opens a checkpoint on disk: its tensors, its config and what it says about generation."""

from pathlib import Path

from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.safetensors import SafetensorsSource
from phi3_jax.checkpoint.source import CheckpointError, CheckpointSource, TensorSource
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config


def open_checkpoint(path: Path) -> tuple[CheckpointSource, Phi3Config]:
    """The tensors and the config of a directory in Hugging Face's layout or of a GGUF file."""
    if path.suffix == ".gguf" and not path.is_dir():
        gguf = GGUFSource(path)
        return gguf, Phi3Config.from_dict(gguf.config_dict())
    if not path.is_dir():
        problem = "is a file; name its directory, or a .gguf file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {problem}")
    try:
        config = Phi3Config.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}") from error
    return SafetensorsSource(path), config


def read_generation_config(source: TensorSource, path: Path, config: Phi3Config) -> GenerationConfig:
    """What the checkpoint says about generation; without a word, what its config says.

    Raises:
        CheckpointError: its generation_config.json is broken.
    """
    try:
        if isinstance(source, GGUFSource):
            return GenerationConfig.from_dict(source.generation_config())
        return GenerationConfig.from_pretrained(path)
    except FileNotFoundError:
        return GenerationConfig.from_model(config)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
