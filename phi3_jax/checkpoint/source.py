"""What a checkpoint is to the rest of the package: named tensors, read one at a time."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Tensors on disk under Hugging Face's names and in Hugging Face's layout.

    `names`, `shape` and `dtype` come from headers and cost nothing; only `read` touches the data.
    """

    def names(self) -> Sequence[str]:
        """Every tensor's name, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape as Hugging Face stores it."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns; bfloat16 is ml_dtypes.bfloat16."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, read from disk now and kept by nobody else."""
        ...


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says what is wrong with it and what to do."""
