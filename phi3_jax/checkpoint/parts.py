"""Reads parameters from stored tensors: each process reads once the parts that its devices hold."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from phi3_jax.checkpoint.layout import TensorLayout
from phi3_jax.checkpoint.source import CheckpointSource
from phi3_jax.parallel.distributed import run_everywhere
from phi3_jax.storage.fetch import remote_files

BLOCK = 1 << 23
"""The bytes that are read at once and cut into parts."""

SHARE = 1 << 21
"""The bytes that are read at once for each device of several processes."""

Box = tuple[tuple[int, int], ...]
"""A part of a parameter: on each axis its start and its stop."""


def put_parameter(
    source: CheckpointSource,
    name: str,
    layout: TensorLayout,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: Sharding | None,
) -> jax.Array:
    """Puts the parameter that is stored as `name` on its devices.

    It waits for the transfer, so that host memory does not hold many tensors on their way. If the devices
    belong to several processes, all of them call this. Of a remote file they read each byte once, and an
    error in one is raised in all.
    """

    def read(box: Box) -> np.ndarray:
        rows, columns = layout.reads(shape, tuple(slice(*ends) for ends in box))
        part = source.read_part(name, rows, columns)
        return np.ascontiguousarray(part.reshape(_sizes(box)), dtype)

    if where is None:
        return jax.device_put(read(tuple((0, size) for size in shape))).block_until_ready()
    boxes = {
        device: tuple(ends.indices(size)[:2] for ends, size in zip(index, shape, strict=True))
        for device, index in where.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    different = list(dict.fromkeys(boxes.values()))
    if isinstance(where, NamedSharding) and not where.is_fully_addressable and remote_files(source.path):
        parts = {box: np.empty(_sizes(box), dtype) for box in different}
        _read_together(source, name, layout, shape, dtype, where, parts)
    elif len(different) == 1:
        parts = {different[0]: read(different[0])}
    else:
        parts = {box: np.empty(_sizes(box), dtype) for box in different}
        for block in _blocks(different, dtype.itemsize):
            values = read(block)
            for box, part in parts.items():
                common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, box, strict=True))
                if all(start < stop for start, stop in common):
                    part[_within(common, box)] = values[_within(common, block)]
    arrays = {}
    while parts:
        box, part = parts.popitem()  # each part is freed when its devices have it
        for device in (device for device, own in boxes.items() if own == box):
            arrays[device] = jax.device_put(part, device).block_until_ready()
    return jax.make_array_from_single_device_arrays(shape, where, [arrays[device] for device in boxes])


def _read_together(
    source: CheckpointSource,
    name: str,
    layout: TensorLayout,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: NamedSharding,
    parts: dict[Box, np.ndarray],
) -> None:
    """Fills the parts of this process; all processes read an equal share of the rows and exchange it.

    A mesh may divide columns, of which no process can read its own without those of the others; a store is
    slower than the network between the devices.
    """
    axes = layout.row_axes
    rows, columns = math.prod(shape[:axes]), shape[axes:]
    devices = where.mesh.devices.reshape(-1)
    size = math.prod(columns) * dtype.itemsize
    share = max(1, min(SHARE // size, -(-rows // devices.size)))  # the rows that a device gets of a block
    by_columns = (*where.spec, *(None,) * (len(shape) - len(where.spec)))[axes:]
    dividing = [axis for each in by_columns if each for axis in ((each,) if isinstance(each, str) else each)]
    others = [axis for axis in where.mesh.axis_names if axis not in dividing]
    by_rows = NamedSharding(where.mesh, PartitionSpec((*dividing, *others)))
    exchange = _exchange(where.mesh, tuple(dividing), by_columns)
    numbers = {
        box: np.arange(rows).reshape(shape[:axes])[tuple(slice(*ends) for ends in box[:axes])].reshape(-1)
        for box in parts
    }
    for first in range(0, rows, share * devices.size):
        whole = (share * devices.size, *columns)  # the last devices may get rows that do not exist
        indices: Any = by_rows.addressable_devices_indices_map(whole)
        # By rows, so that those that do not exist come last.
        own = dict(sorted(indices.items(), key=lambda each: each[1][0].start))

        def read(first: int = first, own: Any = own) -> np.ndarray:
            numbers = [
                range(first + index.start, min(first + index.stop, rows)) for index, *_ in own.values()
            ]
            values = np.zeros((len(own), share, *columns), dtype)
            runs = layout.row_runs(shape, list(chain.from_iterable(numbers)))
            if runs:
                part = source.read_part(name, runs, slice(0, math.prod(columns)))
                values.reshape(-1, *columns)[: len(part)] = part.reshape(-1, *columns)
            return values

        arrays = [jax.device_put(*each) for each in zip(run_everywhere(read), own, strict=True)]
        block = exchange(jax.make_array_from_single_device_arrays(whole, by_rows, arrays))
        pieces = {
            tuple(
                ends.indices(width)[:2] for ends, width in zip(piece.index[1:], columns, strict=True)
            ): piece
            for piece in block.addressable_shards
        }
        for box, part in parts.items():
            start, stop = np.searchsorted(numbers[box], (first, first + len(block)))
            if start < stop:
                values = np.asarray(pieces[box[axes:]].data)
                flat = part.reshape(-1, *part.shape[axes:])
                flat[start:stop] = values[numbers[box][start:stop] - first]


@cache
def _exchange(mesh: Mesh, dividing: tuple[str, ...], by_columns: tuple[Any, ...]) -> Callable[..., jax.Array]:
    """Returns a program that gives devices that share a block's rows all rows of their columns."""

    def exchange(block: jax.Array) -> jax.Array:
        # First those that need the same columns: the compiler does both at once by copying the whole.
        return jax.lax.with_sharding_constraint(block, NamedSharding(mesh, PartitionSpec(dividing or None)))

    return jax.jit(exchange, out_shardings=NamedSharding(mesh, PartitionSpec(None, *by_columns)))


def _blocks(boxes: list[Box], itemsize: int) -> Iterator[Box]:
    """Yields the box around all boxes, which are usually adjacent, in blocks along the first axis."""
    first, *others = ((min(a for a, _ in ends), max(b for _, b in ends)) for ends in zip(*boxes, strict=True))
    step = max(1, BLOCK // (itemsize * math.prod(_sizes(tuple(others)))))
    for start in range(*first, step):
        yield ((start, min(start + step, first[1])), *others)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Returns `box` as an index into an array of `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))
