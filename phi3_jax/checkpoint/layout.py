"""The table of layouts that converts checkpoint tensors to parameters and back.

Names are the same on both sides. A parameter's first axes are the stored rows, and its last axes the columns.
The rows of two are in another order: Phi-3's fused query/key/value, and Phi-3-small's `up_proj`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError

Index = tuple[slice, ...]
"""A part of a parameter: for each axis a slice without a step."""


def _plain_order(shape: tuple[int, ...]) -> Int[np.ndarray, "..."]:
    return np.arange(math.prod(shape)).reshape(shape)


def _group_order(shape: tuple[int, ...]) -> Int[np.ndarray, "K slots H"]:
    """Returns the numbers of [all q, all k, all v] rows as [K, G + 2, H]: of each group its q, k and v."""
    kv_heads, slots, head_dim = shape
    heads = np.arange(kv_heads * slots)
    queries, keys, values = np.split(heads, (kv_heads * (slots - 2), kv_heads * (slots - 1)))
    grouped = np.concatenate(
        [queries.reshape(kv_heads, slots - 2), keys[:, None], values[:, None]], axis=1
    )  # [K, G + 2]
    return grouped[..., None] * head_dim + np.arange(head_dim)


def _turns_order(shape: tuple[int, ...]) -> Int[np.ndarray, "2 F"]:
    """Returns the numbers of rows that take turns as [all even ones, all odd ones]."""
    return np.arange(math.prod(shape)).reshape(shape[::-1]).T


@dataclass(frozen=True)
class TensorLayout:
    """The layout of one kind of parameter in the checkpoint."""

    row_axes: int
    """The number of the parameter's first axes that are stored as rows; the others are columns."""
    rows: Callable[[tuple[int, ...]], Int[np.ndarray, "..."]] = _plain_order
    """Returns the numbers of the stored rows on row axes of these sizes."""

    def checkpoint_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the stored tensor for a parameter of this shape."""
        columns = shape[self.row_axes :]
        rows = (math.prod(shape[: self.row_axes]),)
        return (*rows, math.prod(columns)) if columns else rows

    def reads(self, shape: tuple[int, ...], index: Index) -> tuple[list[slice], slice]:
        """Returns the runs of stored rows that hold a part of the parameter, in its order, and the columns.

        Raises:
            UserError: the part's columns are not adjacent.
        """
        rows = self.rows(shape[: self.row_axes])[index[: self.row_axes]]
        columns = _plain_order(shape[self.row_axes :])[index[self.row_axes :]]
        adjacent = _runs(columns.reshape(-1))
        if len(adjacent) != 1:
            raise UserError(
                f"{index} of a parameter {shape} has its columns in {len(adjacent)} runs; expected one"
            )
        return _runs(rows.reshape(-1)), adjacent[0]

    def row_runs(self, shape: tuple[int, ...], numbers: Sequence[int]) -> list[slice]:
        """Returns the runs of stored rows that hold the parameter's rows of these numbers, in their order."""
        return _runs(self.rows(shape[: self.row_axes]).reshape(-1)[list(numbers)])

    def to_checkpoint(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the whole parameter as it is stored."""
        stored = parameter.reshape(self.checkpoint_shape(parameter.shape))
        if self.rows is _plain_order:
            return stored
        moved = np.empty_like(stored)
        moved[self.rows(parameter.shape[: self.row_axes]).reshape(-1)] = stored
        return moved


def _runs(numbers: Int[np.ndarray, " n"]) -> list[slice]:
    """Returns numbers as runs: 4, 5, 6, 1, 2 as 4 to 7 and 1 to 3."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    parts: Sequence[np.ndarray] = np.split(numbers, breaks)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if part.size]


LAYOUTS = {
    "qkv_proj.weight": TensorLayout(3, _group_order),
    "gate_up_proj.weight": TensorLayout(2),
    "o_proj.weight": TensorLayout(1),
    **dict.fromkeys(("query_key_value.weight", "query_key_value.bias"), TensorLayout(3)),
    **dict.fromkeys(("up_proj.weight", "up_proj.bias"), TensorLayout(2, _turns_order)),
}
"""Layouts by the last two parts of the name; other tensors are the same on both sides."""

_SAME = TensorLayout(1)


def layout_of(name: str) -> TensorLayout:
    """Returns the layout of the tensor called `name`."""
    return LAYOUTS.get(".".join(name.split(".")[-2:]), _SAME)


def ignorable(name: str) -> bool:
    """Whether this tensor is unused but allowed: old checkpoints have rope's buffers."""
    return name.endswith("rotary_emb.inv_freq")
