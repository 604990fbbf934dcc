"""The files of a checkpoint's directory besides its weights and its config."""

import re
import shutil
from pathlib import Path

from phi3_jax.config.generation_config import GENERATION_CONFIG_NAME, GenerationConfig
from phi3_jax.config.model_config import CONFIG_NAME
from phi3_jax.errors import CheckpointError
from phi3_jax.storage.fetch import ORIGIN
from phi3_jax.tokenizer import TOKENIZER_FILES, Phi3Tokenizer

MODEL_FILES = re.compile(
    rf"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|{re.escape(GENERATION_CONFIG_NAME)}"
)
"""Names of the files that belong to a model, and go with it when another takes its directory."""

CHECKPOINT_FILES = re.compile(
    "|".join([MODEL_FILES.pattern, r"adapter_(config|model)\..*", *map(re.escape, TOKENIZER_FILES)])
)
"""Names of the files that belong to a model, its tokenizer or its adapters."""

_LEFT_OUT = (
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".index.json",
    ORIGIN,
)


class DirectoryFiles:
    """The part of a checkpoint's interface that the files of its directory give, besides the weights."""

    path: Path

    def generation_config(self) -> GenerationConfig | None:
        try:
            return GenerationConfig.from_pretrained(self.path)
        except FileNotFoundError:
            return None

    def tokenizer(self) -> Phi3Tokenizer:
        try:
            return Phi3Tokenizer.from_pretrained(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(str(error)) from error

    def write_companions(self, directory: Path) -> None:
        copy_companions(self.path, directory)


def copy_companions(source: Path, destination: Path) -> None:
    """Copies the files other than weights and config.json, above all the tokenizer's.

    Raises:
        CheckpointError: one of them is a link to a file elsewhere.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != CONFIG_NAME and not path.name.endswith(_LEFT_OUT):
            shutil.copyfile(own_file(path), destination / path.name)


def own_file(path: Path) -> Path:
    """Returns the file of a name in a checkpoint's directory, which may be a link of the Hub's cache.

    Raises:
        CheckpointError: it is a link to a file elsewhere, which the copy of a checkpoint must not publish.
    """
    file, directory = path.resolve(), path.parent.resolve()
    folders = [directory]
    if directory.parent.name == "snapshots":  # models--org--name/snapshots/REVISION, beside blobs
        folders.append(directory.parents[1] / "blobs")
    if not any(file.is_relative_to(folder) for folder in folders):
        raise CheckpointError(
            f"{path} is a link to {file}, which is not in the checkpoint; put a copy of the file in its "
            "place, or remove the link"
        )
    return file
