"""The files of a checkpoint's directory besides its weights and its config."""

import shutil
from pathlib import Path

from phi3_jax.config.model_config import CONFIG_NAME

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")


def copy_companions(source: Path, destination: Path) -> None:
    """Copies the files other than weights and config.json, above all the tokenizer's."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != CONFIG_NAME and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, destination / path.name)
