"""Tests the spellings of replica groups, and their mesh axes."""

import itertools

import numpy as np
import pytest

from phi3_jax.plan import groups

MESH = {"data": 2, "fsdp": 2, "context": 1, "tensor": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups={}, x=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([3,1,0,2]) {'b'}", [[3, 1], [0, 2]]),
        ("to_apply=%add", None),
    ],
)
def test_reads_every_spelling_of_groups(text: str, expected: list[list[int]] | None) -> None:
    assert groups.replica_groups(text, 8) == expected


@pytest.mark.parametrize(
    "axes", [c for n in range(4) for c in itertools.combinations(("data", "fsdp", "tensor"), n)]
)
def test_finds_the_axes_of_groups(axes: tuple[str, ...]) -> None:
    ids = np.arange(12).reshape(2, 2, 1, 3)
    dims = [list(MESH).index(axis) for axis in axes]
    others = [dim for dim in range(4) if dim not in dims]
    members = int(np.prod([MESH[axis] for axis in axes]))
    rows = ids.transpose(others + dims).reshape(-1, members).tolist()
    assert groups.mesh_axes(rows, MESH) == axes


def test_other_groups_follow_no_axes() -> None:
    assert groups.mesh_axes([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]], MESH) is None
    assert groups.mesh_axes([[0, 1, 2]], MESH) is None


def test_reads_permuted_pairs_and_their_axes() -> None:
    pairs = groups.permuted_pairs("source_target_pairs={{0,3},{3,0}}, x={1}")
    assert pairs == [[0, 3], [3, 0]]
    assert groups.pair_axes(pairs, MESH) == ("fsdp",)
    assert groups.pair_axes([[0, 9]], MESH) == ("data", "fsdp")
    assert groups.pair_axes([[0, 99]], MESH) is None
