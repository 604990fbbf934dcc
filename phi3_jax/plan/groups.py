"""Reads HLO's replica groups, the devices that take part in a collective, and matches them with mesh axes."""

import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

Groups = list[list[int]]

_IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
_AXIS = re.compile(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def replica_groups(attributes: str, devices: int) -> Groups | None:
    """Returns the groups in an instruction's attributes, or None if there are none that can be read.

    The spellings are `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, 2 groups of 4 of the transposed [4, 2] array of
    ids; `mesh['a'=2,'b'=4] {'b'}`, along axis b; and `{}`, all devices together.
    """
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})?\}", attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", match[1] or "")] or [
            list(range(devices))
        ]
    if match := re.search(rf"replica_groups={_IOTA}", attributes):
        groups, _, _ = shape = match.groups()
        return _iota(*shape).reshape(_numbers(groups)).tolist()
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    ):
        return _groups_along_axes(*match.groups())
    return None


def _iota(groups: str, reshaped: str, transposed: str | None) -> np.ndarray:
    """Returns the device ids of OpenXLA's `IotaTileAssignment`."""
    ids = np.arange(np.prod(_numbers(reshaped))).reshape(_numbers(reshaped))
    return ids.transpose(_numbers(transposed)) if transposed else ids


def _groups_along_axes(mesh: str, order: str | None, chosen: str) -> Groups | None:
    """Reads OpenXLA's `Mesh` and `AxisRef`: `'a'` is a whole axis, `'a':(2)4` its factor of 4 after one of 2.

    Each axis of the mesh is split into the factors that the references name, so that a group is the devices
    along some of the split dimensions.
    """
    sizes = {name.strip("'"): int(size) for name, size in (axis.split("=") for axis in mesh.split(","))}
    ids = np.arange(np.prod(list(sizes.values())))
    if order:
        ids = (
            _iota(*iota.groups()) if (iota := re.match(_IOTA, order)) else np.array(_numbers(order))
        ).reshape(-1)
        if ids.size != np.prod(list(sizes.values())):
            return None
    references = [match.groups() for match in _AXIS.finditer(chosen)]
    shape: list[int] = []
    dims: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        cuts = {1, size}
        for axis, before, part in references:
            if axis == name and before is not None:
                cuts |= {int(before), int(before) * int(part)}
        for low, high in itertools.pairwise(sorted(cuts)):
            if high % low:
                return None
            dims[name, low] = len(shape)
            shape.append(high // low)
    grouped: list[int] = []
    for axis, before, part in references:
        end = sizes.get(axis, 0) if before is None else int(before) * int(part)
        start = 1 if before is None else int(before)
        grouped += [dim for (name, low), dim in dims.items() if name == axis and start <= low < end]
    others = [dim for dim in range(len(shape)) if dim not in grouped]
    members = int(np.prod([shape[dim] for dim in grouped]))
    return ids.reshape(shape).transpose(others + grouped).reshape(-1, members).tolist()


def permuted_pairs(attributes: str) -> Groups:
    """Returns the [source, target] pairs of a collective-permute."""
    match = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes)
    return [_numbers(pair) for pair in re.findall(r"\{([\d, ]*)\}", match[1])] if match else []


def mesh_axes(groups: Iterable[Iterable[int]], mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    """Returns the mesh axes whose devices these groups are; None if there are no such axes."""
    sizes = list(mesh.values())
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    wanted = {frozenset(group) for group in groups}
    members = {len(group) for group in wanted}
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    for count in range(len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            if members != {int(np.prod([sizes[axis] for axis in chosen]))}:
                continue
            others = [axis for axis in range(len(sizes)) if axis not in chosen]
            rows = ids.transpose([*others, *chosen]).reshape(-1, *members)
            if {frozenset(row) for row in rows.tolist()} == wanted:
                return tuple(list(mesh)[axis] for axis in chosen)
    return None


def pair_axes(pairs: Groups, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    """Returns the mesh axes in which sources and targets differ."""
    sizes = list(mesh.values())
    if not pairs or max(map(max, pairs)) >= np.prod(sizes):
        return None
    sources, targets = (np.array(np.unravel_index(side, sizes)) for side in zip(*pairs, strict=True))
    return tuple(name for name, moved in zip(mesh, (sources != targets).any(axis=1), strict=True) if moved)
