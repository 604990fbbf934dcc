"""The one table between checkpoint tensors and parameters, read in both directions.

Names are the same on both sides. Most tensors differ in shape alone, [out, in] against axes told apart; only
the fused query/key/value rows stand in another order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How one kind of tensor stands in the checkpoint: its shape there, and the way in and back."""

    checkpoint_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    to_parameter: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    to_checkpoint: Callable[[np.ndarray], np.ndarray]


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (math.prod(shape[:-1]), shape[-1])


def _columns(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], math.prod(shape[1:]))


def _group_qkv(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[all q, all k, all v] rows to [K, G + 2, H, D]: each key/value head's queries, its key, its value."""
    kv_heads, slots, head_dim, hidden = shape
    heads = rows.reshape(-1, head_dim, hidden)
    queries = kv_heads * (slots - 2)
    return np.concatenate(
        [
            heads[:queries].reshape(kv_heads, slots - 2, head_dim, hidden),
            heads[queries : queries + kv_heads, None],
            heads[queries + kv_heads :, None],
        ],
        axis=1,
    )


def _ungroup_qkv(parameter: np.ndarray) -> np.ndarray:
    hidden = parameter.shape[-1]
    parts = (parameter[:, :-2], parameter[:, -2], parameter[:, -1])
    return np.concatenate([part.reshape(-1, hidden) for part in parts])


def _reshape(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.reshape(shape)


LAYOUTS = {
    "qkv_proj.weight": Layout(_rows, _group_qkv, _ungroup_qkv),
    "gate_up_proj.weight": Layout(_rows, _reshape, lambda p: p.reshape(_rows(p.shape))),
    "o_proj.weight": Layout(_columns, _reshape, lambda p: p.reshape(_columns(p.shape))),
}
"""By the last two parts of the name; tensors not named here are the same on both sides."""

_SAME = Layout(lambda shape: shape, _reshape, lambda p: p)


def layout_of(name: str) -> Layout:
    """The layout of the tensor called `name`."""
    return LAYOUTS.get(".".join(name.split(".")[-2:]), _SAME)


def ignorable(name: str) -> bool:
    """Whether a checkpoint may hold this tensor though nothing needs it: old ones hold rope's buffers."""
    return name.endswith("rotary_emb.inv_freq")
