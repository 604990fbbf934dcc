"""From a loader's batches to the devices: which rows this process makes, and where they go."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import sharding, shards


def check_rows(rows: int, parts: int, mesh: Mesh | None, name: str) -> None:
    """Whether `rows` divide over `parts` micro-batches and the mesh.

    Raises:
        ValueError: they do not; the text names a number that would.
    """
    unit = parts * (1 if mesh is None else shards(mesh, "batch"))
    if rows % unit:
        near = max(unit, round(rows / unit) * unit)
        raise UserError(
            f"{name}={rows} does not divide over {unit} (micro-batches times the mesh's data x fsdp); "
            f"use {near}, say"
        )


def width_multiple(mesh: Mesh | None, multiple: int = 8) -> int:
    """What the widths of rows must be multiples of."""
    return multiple if mesh is None else math.lcm(multiple, mesh.shape["context"])


def local_rows(rows: int, mesh: Mesh | None) -> Int[np.ndarray, "local"] | None:
    """The rows of a batch that this process's devices hold; None: all."""
    if mesh is None or not mesh.is_multi_process:
        return None
    parts = sharding(mesh, ("batch",)).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts if part is not None]))


def to_devices(
    arrays: Mapping[str, np.ndarray], rows: int, mesh: Mesh | None, own: Int[np.ndarray, "local"] | None
) -> dict[str, Any]:
    """A batch as a step takes it, divided over `mesh`; `arrays` holds the rows that this process makes."""
    if mesh is None:
        return dict(arrays)

    def put(x: np.ndarray) -> jax.Array:
        shape = (rows, *x.shape[1:])
        # Numbers for each class stand in rows too, but not those for each token.
        tokens = x.ndim == 2 and np.issubdtype(x.dtype, np.integer)
        where = sharding(mesh, ("batch", "length") if tokens else ("batch", None)[: x.ndim])

        def part(index: Any) -> np.ndarray:
            held = np.arange(rows)[index[0]]
            return x[held if own is None else np.searchsorted(own, held)][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, where, part)

    return {name: put(x) for name, x in arrays.items()}
