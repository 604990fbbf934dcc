"""Who talks to whom in a collective: HLO's replica groups, read and matched with the axes of the mesh."""

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
    """The groups that an instruction's attributes name, in any of their four spellings; None: none can be
    read.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`: 2 groups of 4 of the transposed [4, 2] array of ids;
    `mesh['a'=2,'b'=4] {'b'}`: along axis b; `{}`: all devices together.
    """
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})?\}", attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", found[1] or "")] or [
            list(range(devices))
        ]
    if found := re.search(rf"replica_groups={_IOTA}", attributes):
        groups, _, _ = shape = found.groups()
        return _iota(*shape).reshape(_numbers(groups)).tolist()
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    ):
        return _along_axes(*found.groups())
    return None


def _iota(groups: str, reshaped: str, transposed: str | None) -> np.ndarray:
    """OpenXLA's `IotaTileAssignment`."""
    ids = np.arange(np.prod(_numbers(reshaped))).reshape(_numbers(reshaped))
    return ids.transpose(_numbers(transposed)) if transposed else ids


def _along_axes(mesh: str, order: str | None, chosen: str) -> Groups | None:
    """OpenXLA's `Mesh` and `AxisRef`: `'a'` is a whole axis, `'a':(2)4` its 4 parts behind a factor of 2."""
    sizes = {name.strip("'"): int(size) for name, size in (axis.split("=") for axis in mesh.split(","))}
    ids = np.arange(np.prod(list(sizes.values())))
    if order:
        ids = (
            _iota(*iota.groups()) if (iota := re.match(_IOTA, order)) else np.array(_numbers(order))
        ).reshape(-1)
        if ids.size != np.prod(list(sizes.values())):
            return None
    wanted = [found.groups() for found in _AXIS.finditer(chosen)]
    shape: list[int] = []
    places: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        cuts = {1, size}
        for axis, before, part in wanted:
            if axis == name and before is not None:
                cuts |= {int(before), int(before) * int(part)}
        for low, high in itertools.pairwise(sorted(cuts)):
            if high % low:
                return None
            places[name, low] = len(shape)
            shape.append(high // low)
    grouped: list[int] = []
    for axis, before, part in wanted:
        end = sizes.get(axis, 0) if before is None else int(before) * int(part)
        start = 1 if before is None else int(before)
        grouped += [place for (name, low), place in places.items() if name == axis and start <= low < end]
    others = [place for place in range(len(shape)) if place not in grouped]
    members = int(np.prod([shape[place] for place in grouped]))
    return ids.reshape(shape).transpose(others + grouped).reshape(-1, members).tolist()


def permuted_pairs(attributes: str) -> Groups:
    """The [source, target] pairs of a collective-permute."""
    found = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes)
    return [_numbers(pair) for pair in re.findall(r"\{([\d, ]*)\}", found[1])] if found else []


def mesh_axes(groups: Iterable[Iterable[int]], mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes along which these groups lie; None: they are not all devices along some axes."""
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
    """The mesh axes in which sources and targets differ."""
    sizes = list(mesh.values())
    if not pairs or max(map(max, pairs)) >= np.prod(sizes):
        return None
    sources, targets = (np.array(np.unravel_index(side, sizes)) for side in zip(*pairs, strict=True))
    return tuple(name for name, moved in zip(mesh, (sources != targets).any(axis=1), strict=True) if moved)
