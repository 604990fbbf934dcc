"""Reads parameters from stored tensors: each process reads once the parts that its devices hold."""

import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Sharding

from phi3_jax.checkpoint.layout import TensorLayout
from phi3_jax.checkpoint.source import CheckpointSource

BLOCK = 1 << 23
"""The bytes that are read at once and cut into parts."""

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

    It waits for the transfer, so that host memory does not hold many tensors on their way.
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
    if len(different) == 1:
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
