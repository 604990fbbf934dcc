"""The interface of a checkpoint on disk: named tensors, read one at a time, and the files beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.errors import CheckpointError
from phi3_jax.quantization import StoredWeight, WeightForm
from phi3_jax.tokenizer import Phi3Tokenizer

__all__ = [
    "CheckpointError",
    "CheckpointSource",
    "FloatSource",
    "QuantizedTensors",
    "TensorSource",
    "has_quantized_weights",
]


class TensorSource(Protocol):
    """Tensors on disk under Hugging Face's names and in Hugging Face's layout.

    `names`, `shape` and `dtype` come from headers and cost nothing; only `read` touches the data.
    """

    def names(self) -> Sequence[str]:
        """Returns every tensor's name, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the tensor's shape as Hugging Face stores it."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of what `read` returns; bfloat16 is ml_dtypes.bfloat16."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads the tensor from disk; the source keeps no copy."""
        ...


class QuantizedTensors(TensorSource, Protocol):
    """Tensors of which some may be quantized weights, which `read` dequantizes."""

    def form(self, name: str) -> WeightForm | None:
        """Returns the form of a quantized weight, or None for floats.

        It comes from headers, and from the order of a weight's inputs, which is small.

        Raises:
            CheckpointError: the weight is stored in parts of different forms.
        """
        ...

    def read_quantized(self, name: str) -> StoredWeight:
        """Reads a weight that has a form.

        Raises:
            CheckpointError: its numbers cannot be those of a weight; the message names file and tensor.
        """
        ...


def has_quantized_weights(source: QuantizedTensors) -> bool:
    """Whether some weight of a checkpoint is quantized."""
    return any(source.form(name) is not None for name in source.names())


class FloatSource:
    """The part of a checkpoint's interface that is the same for all whose tensors are floats."""

    def form(self, name: str) -> WeightForm | None:
        return None

    def read_quantized(self, name: str) -> StoredWeight:
        raise KeyError(f"{name} is not quantized")


class CheckpointSource(QuantizedTensors, Protocol):
    """A checkpoint on disk, whose tensors may be read in parts."""

    @property
    def path(self) -> Path:
        """The directory or the GGUF file."""
        ...

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        """Returns these runs of a tensor's rows, concatenated and cut to these columns [rows, columns].

        A tensor of one dimension has one column. The result may be a view of a larger array.
        """
        ...

    def check_unchanged(self) -> None:
        """Checks that no file of tensors changed since the checkpoint was opened.

        Raises:
            ChangedError: one did, so that tensors that were read may be of different checkpoints.
        """
        ...

    def generation_config(self) -> GenerationConfig | None:
        """Returns the checkpoint's generation settings, or None if it has none.

        Raises:
            UserError: they are broken.
        """
        ...

    def tokenizer(self) -> Phi3Tokenizer:
        """Returns the checkpoint's tokenizer.

        Raises:
            CheckpointError: it has none. UserError: it is broken.
        """
        ...

    def write_companions(self, directory: Path) -> None:
        """Writes the checkpoint's files other than weights and config.json, above all its tokenizer's."""
        ...
