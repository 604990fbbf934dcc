"""Writes a checkpoint with its weights rounded to small integers, without building a model."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from phi3_jax.checkpoint.companions import CHECKPOINT_FILES
from phi3_jax.checkpoint.compressed_tensors import BFLOAT16, CompressedSource, compressed_config
from phi3_jax.checkpoint.convert import check_destination
from phi3_jax.checkpoint.opening import Checkpoint, open_checkpoint
from phi3_jax.checkpoint.safetensors import write_tensors
from phi3_jax.checkpoint.source import (
    CheckpointError,
    CheckpointSource,
    TensorSource,
    has_quantized_weights,
)
from phi3_jax.config.model_config import CONFIG_NAME
from phi3_jax.config.rope_argument import as_longrope
from phi3_jax.errors import UserError
from phi3_jax.quantization import Quantization, StoredWeight, WeightForm, round_weight
from phi3_jax.sources.hub import local_model
from phi3_jax.storage.outputs import exchanging
from phi3_jax.storage.targets import Target


class RoundedSource:
    """A checkpoint of floats whose projections are rounded as they are read, one at a time.

    Raises:
        UserError: groups do not divide the inputs of a weight, or no weight is rounded.
    """

    def __init__(self, source: CheckpointSource, quantization: Quantization):
        self._source, self._quantization = source, quantization
        self.names, self.shape = source.names, source.shape
        self.dtype, self.read = source.dtype, source.read
        self._forms = {
            name: quantization.form(f"{source.path}: {name}", source.shape(name)[1])
            for name in source.names()
            if len(source.shape(name)) == 2 and quantization.includes(name.removesuffix(".weight"))
        }
        if not self._forms:
            raise UserError(f"quantization {quantization} leaves all weights of {source.path} as they are")

    def form(self, name: str) -> WeightForm | None:
        return self._forms.get(name)

    def read_quantized(self, name: str) -> StoredWeight:
        return round_weight(self._source.read(name), self._quantization, f"{self._source.path}: {name}")


class _ReportedSource:
    """Tensors; `report` gets the number of those that were read, and of all, after each one."""

    def __init__(self, source: TensorSource, report: Callable[[int, int], None]):
        self._source, self._report = source, report
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype
        self._count = 0

    def read(self, name: str) -> np.ndarray:
        tensor = self._source.read(name)
        self._count += 1
        self._report(self._count, len(self.names()))
        return tensor


def quantize_checkpoint(
    source_path: str | os.PathLike[str],
    destination_dir: Target,
    quantization: Quantization | str = "int8",
    *,
    max_shard_size: int | str = "5GB",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a checkpoint whose projections are rounded, in the format of compressed-tensors.

    Names and layout are those of transformers and vLLM. It holds one tensor at a time in memory. The
    destination appears whole or not at all.

    Args:
        source_path: a directory in Hugging Face's layout or a GGUF file, or the URL of one, with floats.
        destination_dir: another directory or its URL; a checkpoint in it is replaced, other files stay.
        quantization: such as "int8", "int4:group_size=32", or a `Quantization`.
        max_shard_size: the largest file, such as "5GB".
        report: gets the number of tensors that are written, and of all.

    Raises:
        CheckpointError: the source is not a checkpoint or is quantized already, or the destination has no
            name or cannot be written.
        UserError: the quantization or the size cannot be read, groups do not divide a weight's inputs, or
            numbers are not finite.
    """
    quantization = Quantization.parse(quantization)
    checkpoint, destination = open_floats(source_path, destination_dir)
    rounded = RoundedSource(checkpoint.source, quantization)
    write_rounded(checkpoint, rounded, destination, max_shard_size, report)


def open_floats(
    source_path: str | os.PathLike[str], destination_dir: Target
) -> tuple[Checkpoint, Path | str]:
    """Opens a checkpoint that will be rounded, and returns the directory for the result as a path.

    Raises:
        CheckpointError: the source is not a checkpoint or is quantized already, or the destination has no
            name or is the source.
    """
    path = local_model(source_path)
    checkpoint = open_checkpoint(path)
    destination = check_destination(path, destination_dir)
    if has_quantized_weights(checkpoint.source):
        raise CheckpointError(
            f"{source_path} is quantized already; quantize the original, or make floats of it first "
            "(phi3-jax convert)"
        )
    return checkpoint, destination


def write_rounded(
    checkpoint: Checkpoint,
    rounded: RoundedSource,
    destination: Target,
    max_shard_size: int | str,
    report: Callable[[int, int], None],
) -> None:
    """Writes the tensors of `rounded` and all else of the checkpoint; see `quantize_checkpoint`."""
    source = checkpoint.source
    tensors = CompressedSource(rounded, scale_dtype=lambda _: BFLOAT16)
    config = as_longrope(checkpoint.config)  # the scaling that transformers reads of a Phi-3
    embedding = next((name for name in source.names() if name.endswith("embed_tokens.weight")), None)
    stored = source.dtype(embedding or next(iter(source.names())))
    extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"}
    extra |= {"dtype": str(stored), "quantization_config": compressed_config(rounded)}
    with exchanging(destination, config=CONFIG_NAME, replaced=CHECKPOINT_FILES) as work:
        write_tensors(_ReportedSource(tensors, report), work, max_shard_size)
        source.check_unchanged()
        source.write_companions(work)
        config.replace(extra=extra).save_pretrained(work)
