"""Tests how many tokens memory has room for, before and after a model is loaded."""

import math
from pathlib import Path
from typing import Any

import jax
import pytest
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3ForCausalLM, make_mesh
from phi3_jax.generation import memory
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.model.loading import load_abstract, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path)
    return path


@pytest.mark.parametrize("axes", [None, {"data": 2}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_an_abstract_model_reserves_its_own_memory(
    folder: Path, dtype: str, axes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capacity computed before loading equals the one after loading."""
    mesh = None if axes is None else make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    planned = CompiledModel(load_abstract(Phi3ForCausalLM, folder, dtype=dtype, mesh=mesh))
    loaded = CompiledModel(load_model(Phi3ForCausalLM, folder, dtype=dtype, mesh=mesh))
    assert planned.on_cpu
    assert planned.model.dtype == loaded.model.dtype
    assert memory.token_bytes(planned) == memory.token_bytes(loaded)
    model_bytes = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(loaded.model) for shard in leaf.addressable_shards
    )
    free = 10_000_000
    monkeypatch.setattr(memory, "_free", lambda device: free)
    planned_capacity = memory.token_capacity(planned)
    monkeypatch.setattr(memory, "_free", lambda device: free - model_bytes)
    assert memory.token_capacity(loaded) == planned_capacity > 0
    monkeypatch.setattr(memory, "_free", lambda device: model_bytes // 2)
    assert memory.token_capacity(planned) == 0
