"""Gives a checkpoint another config, without a second copy of its weights."""

import errno
import os
import shutil
from pathlib import Path

from phi3_jax.checkpoint.companions import CHECKPOINT_FILES, copy_companions, own_file
from phi3_jax.checkpoint.convert import check_destination, convert_checkpoint
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.quantized import QuantizedSource
from phi3_jax.checkpoint.safetensors import INDEX, SafetensorsSource, weight_files
from phi3_jax.config.model_config import CONFIG_NAME, Phi3Config
from phi3_jax.storage.fetch import download
from phi3_jax.storage.objects import RemoteFile
from phi3_jax.storage.outputs import exchanging
from phi3_jax.storage.targets import Target


def reconfigure_checkpoint(source: Path, destination_dir: Target, config: Phi3Config) -> None:
    """Writes the checkpoint with another config to another directory or its URL, whole or not at all.

    The weights of a directory are hard links where the file system can, else copies; a GGUF file, or a Llama
    checkpoint, is converted. Links are safe: no function of ours changes a weights file in place.

    Raises:
        CheckpointError: the source is not a checkpoint, or the destination cannot be written.
    """
    destination = check_destination(source, destination_dir)
    opened = open_checkpoint(source).source
    if not isinstance(opened, SafetensorsSource | QuantizedSource):  # its tensors need another order
        convert_checkpoint(source, destination, config=config)
        return
    if isinstance(opened, QuantizedSource):
        config = config.replace(extra=config.extra | opened.config_entry)
    with exchanging(destination, config=CONFIG_NAME, replaced=CHECKPOINT_FILES) as work:
        copy_companions(source, work)
        for file in weight_files(source).values():
            if isinstance(file, RemoteFile):
                download(file, work / file.name)
        for pattern in ("*.safetensors", INDEX):
            for path in source.glob(pattern):
                _link(own_file(path), work / path.name)
        config.save_pretrained(work)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(path, to)
