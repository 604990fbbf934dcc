"""A checkpoint under another config: the same weights, which take no room a second time."""

import errno
import os
import shutil
from pathlib import Path

from phi3_jax.checkpoint.atomic import atomic_directory
from phi3_jax.checkpoint.convert import convert_checkpoint, files_beside_weights
from phi3_jax.checkpoint.safetensors import INDEX
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.config.model_config import Phi3Config


def reconfigure_checkpoint(source: Path, destination: Path, config: Phi3Config) -> None:
    """Writes the checkpoint to another directory, with `config` for its own; whole or not at all.

    The weights of a directory are linked to where the file system can, else copied; a GGUF file is converted.
    Nothing here changes a weights file in place, so that neither checkpoint feels what becomes of the other.

    Raises:
        CheckpointError: the source is not a checkpoint, or the destination cannot be written.
    """
    if destination.exists() and destination.samefile(source):
        raise CheckpointError(f"{destination} is the checkpoint itself; name another directory")
    if not source.is_dir():
        convert_checkpoint(source, destination, config=config)
        return
    with atomic_directory(destination) as work:
        for path in files_beside_weights(source):
            shutil.copyfile(path, work / path.name)
        for pattern in ("*.safetensors", INDEX):
            for path in source.glob(pattern):
                _link(path.resolve(), work / path.name)  # the Hub's cache has symbolic links
        config.save_pretrained(work)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(path, to)
