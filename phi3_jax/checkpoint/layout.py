"""The one table between checkpoint tensors and parameters, read in both directions.

Names are the same on both sides. A parameter's axes are the stored rows, told apart, and then the columns;
only the fused query/key/value rows stand in another order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError

Index = tuple[slice, ...]
"""A part of a parameter: a slice without steps for each axis."""


def _in_order(shape: tuple[int, ...]) -> Int[np.ndarray, "..."]:
    return np.arange(math.prod(shape)).reshape(shape)


def _grouped(shape: tuple[int, ...]) -> Int[np.ndarray, "K slots H"]:
    """[all q, all k, all v] rows as [K, G + 2, H]: each key/value head's queries, its key, its value."""
    kv_heads, slots, head_dim = shape
    heads = np.arange(kv_heads * slots)
    queries, keys, values = np.split(heads, (kv_heads * (slots - 2), kv_heads * (slots - 1)))
    grouped = np.concatenate(
        [queries.reshape(kv_heads, slots - 2), keys[:, None], values[:, None]], axis=1
    )  # [K, G + 2]
    return grouped[..., None] * head_dim + np.arange(head_dim)


@dataclass(frozen=True)
class TensorLayout:
    """How one kind of parameter stands in the checkpoint."""

    row_axes: int
    """How many of the parameter's axes, from the front, are stored as rows; the others are the columns."""
    rows: Callable[[tuple[int, ...]], Int[np.ndarray, "..."]] = _in_order
    """The number of the stored row for each place on the row axes, whose sizes it is given."""

    def checkpoint_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the stored tensor, for a parameter of this shape."""
        columns = shape[self.row_axes :]
        rows = (math.prod(shape[: self.row_axes]),)
        return (*rows, math.prod(columns)) if columns else rows

    def reads(self, shape: tuple[int, ...], index: Index) -> tuple[list[slice], slice]:
        """The runs of stored rows that hold a part of the parameter, in its order, and the columns.

        Raises:
            ValueError: the part's columns do not stand side by side.
        """
        rows = self.rows(shape[: self.row_axes])[index[: self.row_axes]]
        columns = _in_order(shape[self.row_axes :])[index[self.row_axes :]]
        side_by_side = _runs(columns.reshape(-1))
        if len(side_by_side) != 1:
            raise UserError(f"{index} of a parameter {shape} has its columns in {len(side_by_side)} places")
        return _runs(rows.reshape(-1)), side_by_side[0]

    def to_checkpoint(self, parameter: np.ndarray) -> np.ndarray:
        """The whole parameter as it is stored."""
        stored = parameter.reshape(self.checkpoint_shape(parameter.shape))
        if self.rows is _in_order:
            return stored
        moved = np.empty_like(stored)
        moved[self.rows(parameter.shape[: self.row_axes]).reshape(-1)] = stored
        return moved


def _runs(numbers: Int[np.ndarray, " n"]) -> list[slice]:
    """Numbers as ranges: 4, 5, 6, 1, 2 as 4 to 7 and 1 to 3."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    parts: Sequence[np.ndarray] = np.split(numbers, breaks)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if part.size]


LAYOUTS = {
    "qkv_proj.weight": TensorLayout(3, _grouped),
    "gate_up_proj.weight": TensorLayout(2),
    "o_proj.weight": TensorLayout(1),
}
"""By the last two parts of the name; tensors not named here are the same on both sides."""

_SAME = TensorLayout(1)


def layout_of(name: str) -> TensorLayout:
    """The layout of the tensor called `name`."""
    return LAYOUTS.get(".".join(name.split(".")[-2:]), _SAME)


def ignorable(name: str) -> bool:
    """Whether a checkpoint may hold this tensor though nothing needs it: old ones hold rope's buffers."""
    return name.endswith("rotary_emb.inv_freq")
