"""Finds the config of a model whose rope is exported; of the model itself, nothing is read."""

from pathlib import Path
from typing import NamedTuple

from phi3_jax.checkpoint.gguf_config import read_config
from phi3_jax.checkpoint.opening import gguf_file
from phi3_jax.config.model_config import CONFIG_NAME, Phi3Config
from phi3_jax.errors import CheckpointError
from phi3_jax.rope_lab.interchange.transformers import MODEL_TYPES
from phi3_jax.runs.text import read_json
from phi3_jax.sources.gguf_file import GGUFFile
from phi3_jax.sources.hub import find_file


class OpenedConfig(NamedTuple):
    """A model's config, and where it is from."""

    file: Path
    config: Phi3Config
    model_type: str
    """The one of `MODEL_TYPES` whose spelling of ropes fits the file."""


def open_config(model: str | Path) -> OpenedConfig:
    """Reads a model's config.

    Args:
        model: a directory or its URL, a config.json, a .gguf file, or `org/name` on the Hub, of which only
            the config is fetched.

    Raises:
        CheckpointError: there is no such config, or it cannot be read.
        UserError: the config is broken, or of a family without Phi-3's block.
    """
    file = find_file(model, CONFIG_NAME)
    if not file.is_file():
        raise CheckpointError(f"there is no config at {file}; give a model's directory, or a .gguf file")
    if file.suffix == ".gguf":
        gguf = GGUFFile(file)
        return OpenedConfig(file, Phi3Config.from_dict(read_config(gguf), file), gguf.architecture)
    config = Phi3Config.from_json_file(file)
    weights = gguf_file(file.parent) if Path(model).is_dir() else None
    if weights is not None:  # other programs know the model by it
        return OpenedConfig(file, config, GGUFFile(weights).architecture)
    named = read_json(file).get("model_type", config.model_type)
    return OpenedConfig(file, config, named if named in MODEL_TYPES else config.model_type)
