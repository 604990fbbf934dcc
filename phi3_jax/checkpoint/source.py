"""What a checkpoint is to the rest of the package: named tensors, read one at a time."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from phi3_jax.errors import UserError


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


class CheckpointSource(TensorSource, Protocol):
    """A checkpoint on disk, whose tensors may be read in parts."""

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        """These runs of a tensor's rows, one below the other, cut to these columns [rows, columns].

        A tensor of one dimension has one column. May be a view of what it was cut from.
        """
        ...


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the text says what is wrong with it and what to do."""
