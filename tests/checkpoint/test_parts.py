"""A part of a parameter, read from parts of stored tensors, equals that part of the whole parameter."""

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from phi3_jax.checkpoint import parts, safetensors
from phi3_jax.checkpoint.layout import layout_of
from phi3_jax.checkpoint.safetensors import SafetensorsSource
from phi3_jax.parallel.sharding import make_mesh, sharding
from phi3_jax.storage.objects import LocalFile

SHAPES = {
    "layers.0.self_attn.qkv_proj.weight": (3, 4, 5, 12),
    "layers.0.self_attn.o_proj.weight": (12, 3, 2, 5),
    "layers.0.mlp.gate_up_proj.weight": (2, 8, 12),
    "layers.0.mlp.down_proj.weight": (12, 8),
    "layers.0.self_attn.query_key_value.bias": (3, 4, 5),
    "layers.0.mlp.up_proj.weight": (2, 8, 12),
    "layers.0.mlp.up_proj.bias": (2, 8),
    "norm.weight": (12,),
}


@pytest.mark.parametrize("name", SHAPES)
def test_reads_every_part_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(safetensors, "BLOCK", 64)  # reads a few rows at once where columns are cut
    shape, layout = SHAPES[name], layout_of(name)
    parameter = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    stored = np.ascontiguousarray(layout.to_checkpoint(parameter))
    assert stored.shape == layout.checkpoint_shape(shape)
    save_file({"before": np.zeros(3, np.float32), name: stored}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    np.testing.assert_array_equal(source.read(name), stored)
    for axis, (start, stop) in itertools.product(range(len(shape)), ((0, None), (1, None), (0, -1), (1, 2))):
        index: list[Any] = [slice(0, size) for size in shape]
        index[axis] = slice(*slice(start, stop).indices(shape[axis])[:2])
        if name.endswith("o_proj.weight") and axis > 1 and index[axis] != slice(0, shape[axis]):
            with pytest.raises(ValueError, match=r"columns in [36] runs; expected one"):
                layout.reads(shape, tuple(index))
            continue
        rows, columns = layout.reads(shape, tuple(index))
        found = source.read_part(name, rows, columns)
        expected = parameter[tuple(index)]
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ((slice(0, 2), slice(0, 64), slice(0, 12)), [(0, 128)]),
        ((slice(0, 2), slice(20, 30), slice(0, 5)), [(40, 60)]),
        ((slice(1, 2), slice(20, 30), slice(0, 12)), [(41, 60)]),
    ],
)
def test_rows_in_turns_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Any, expected: list[tuple[int, int]]
) -> None:
    """A store would otherwise be asked for single rows."""
    name, shape = "layers.0.mlp.up_proj.weight", (2, 64, 12)
    parameter = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    save_file({name: layout_of(name).to_checkpoint(parameter)}, tmp_path / "model.safetensors")
    source, reads = SafetensorsSource(tmp_path), []
    start = source._stored[name].offset
    original = LocalFile.read

    def record(self: LocalFile, pieces: Any) -> None:
        reads.extend(((at - start) // 48, (at - start + len(memory)) // 48) for at, memory in pieces)
        original(self, pieces)

    monkeypatch.setattr(LocalFile, "read", record)
    found = source.read_part(name, *layout_of(name).reads(shape, index))
    np.testing.assert_array_equal(found.reshape(parameter[index].shape), parameter[index])
    assert reads == expected


SHARDINGS = {
    "layers.0.self_attn.qkv_proj.weight": ("kv_heads", "groups", "head_dim", "embed"),
    "layers.0.mlp.gate_up_proj.weight": ("gate_up", "mlp", "embed"),
    "layers.0.mlp.down_proj.weight": ("embed", "mlp"),
    "layers.0.self_attn.query_key_value.bias": ("kv_heads", "groups", "head_dim"),
    "layers.0.mlp.up_proj.weight": ("gate_up", "mlp", "embed"),
    "layers.0.mlp.up_proj.bias": ("gate_up", "mlp"),
    "norm.weight": ("norm",),
}


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4", "fsdp=8"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_devices_exchange_what_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mesh: str, rows: int
) -> None:
    """Rows do not divide over the devices, whose order in the mesh is not that of the rows."""
    shapes = {
        "qkv": (4, 3, 5, 16),
        "gate": (2, 12, 16),
        "down": (24, 12),
        "value.bias": (4, 3, 5),
        "up_proj.weight": (2, 12, 16),
        "up_proj.bias": (2, 12),
        "norm": (11,),
    }
    shape = next(shape for key, shape in shapes.items() if key in name)
    layout = layout_of(name)
    monkeypatch.setattr(parts, "SHARE", 4 * rows * int(np.prod(shape[layout.row_axes :])))
    parameter = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    save_file({name: layout.to_checkpoint(parameter)}, tmp_path / "model.safetensors")
    where = sharding(make_mesh(mesh), SHARDINGS[name])
    indices = where.addressable_devices_indices_map(shape).values()
    boxes = {tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for index in indices}
    found = {box: np.zeros([stop - start for start, stop in box], np.float32) for box in boxes}
    source: Any = SafetensorsSource(tmp_path)
    parts._read_together(source, name, layout, shape, np.dtype(np.float32), where, found)
    for box, values in found.items():
        np.testing.assert_array_equal(values, parameter[tuple(slice(*ends) for ends in box)])


def test_query_rows_come_before_keys_and_values() -> None:
    """The file has q0 q1 q2 q3 k0 k1 v0 v1 for 2 key/value heads with 2 queries each, of 1 dim."""
    layout = layout_of("layers.0.self_attn.qkv_proj.weight")
    parameter = np.array([[0, 1, 4, 6], [2, 3, 5, 7]]).reshape(2, 4, 1, 1)
    np.testing.assert_array_equal(layout.to_checkpoint(parameter).reshape(-1), np.arange(8))
    second = (slice(1, 2), slice(0, 4), slice(0, 1), slice(0, 1))
    assert layout.reads((2, 4, 1, 1), second) == ([slice(2, 4), slice(5, 6), slice(7, 8)], slice(0, 1))


def test_blocks_cover_all_boxes() -> None:
    boxes = [((2, 6), (0, 3)), ((6, 10), (0, 3))]
    assert list(parts._blocks(boxes, parts.BLOCK // 9)) == [
        ((start, min(start + 3, 10)), (0, 3)) for start in (2, 5, 8)
    ]
