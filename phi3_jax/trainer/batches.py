"""Batches on devices: the rows that this process makes, and their shardings."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import sharding, shards

MOST_ROWS = 2**16
"""The most rows of a batch. Batches are padded to their rows, so that more would fill the memory."""


def check_rows(rows: int, parts: int, mesh: Mesh | AbstractMesh | None, name: str) -> None:
    """Checks that a batch can have this many `rows`, and that they divide over micro-batches and the mesh.

    Raises:
        UserError: they are too many, or do not divide; the message suggests a number that does.
    """
    if rows > MOST_ROWS:
        raise UserError(f"{name}={rows} is more than a batch can have; use {MOST_ROWS} or fewer")
    unit = parts * (1 if mesh is None else shards(mesh, "batch"))
    if rows % unit:
        near = max(unit, round(rows / unit) * unit)
        raise UserError(
            f"{name}={rows} does not divide over {unit} (micro-batches times the mesh's data x fsdp); "
            f"use {near}, for example"
        )


def width_multiple(mesh: Mesh | AbstractMesh | None, multiple: int = 8) -> int:
    """Returns the number that the widths of rows must be multiples of."""
    return multiple if mesh is None else math.lcm(multiple, mesh.shape["context"])


def local_rows(rows: int, mesh: Mesh | None) -> Int[np.ndarray, "local"] | None:
    """Returns the rows of a batch that this process's devices hold; None means all."""
    if mesh is None or not mesh.is_multi_process:
        return None
    parts = sharding(mesh, ("batch",)).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts if part is not None]))


def has_tokens(x: np.ndarray) -> bool:
    """Returns whether an array of a batch has a number for each token, and not for the classes of a row."""
    return x.ndim == 2 and np.issubdtype(x.dtype, np.integer)


def abstract_batch(arrays: Mapping[str, np.ndarray], width: int, mesh: Mesh) -> dict[str, Any]:
    """Returns the shapes of a batch on `mesh` with rows of `width` tokens; `arrays` has one of any width."""

    def shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
        axes = ("batch", "length") if has_tokens(x) else ("batch", None)[: x.ndim]
        sizes = (len(x), width) if has_tokens(x) else x.shape
        return jax.ShapeDtypeStruct(sizes, x.dtype, sharding=sharding(mesh, axes))

    return {name: shape(x) for name, x in arrays.items()}


def to_devices(
    arrays: Mapping[str, np.ndarray], rows: int, mesh: Mesh | None, own: Int[np.ndarray, "local"] | None
) -> dict[str, Any]:
    """Returns a batch divided over `mesh`; `arrays` has the rows that this process makes, `own`."""
    if mesh is None:
        return dict(arrays)

    def put(x: np.ndarray) -> jax.Array:
        shape = (rows, *x.shape[1:])
        spec = sharding(mesh, ("batch", "length") if has_tokens(x) else ("batch", None)[: x.ndim])

        def part(index: Any) -> np.ndarray:
            held = np.arange(rows)[index[0]]
            return x[held if own is None else np.searchsorted(own, held)][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, spec, part)

    return {name: put(x) for name, x in arrays.items()}
