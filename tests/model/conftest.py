"""Fixtures for tests of attention kernels: cuDNN and TPUs that are absent."""

import importlib.util
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from phi3_jax.model.kernels import cudnn


@pytest.fixture
def cudnn_is_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets JAX lower programs for CUDA as if cuDNN were installed."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    cudnn._installed.cache_clear()
    yield
    cudnn._installed.cache_clear()


@pytest.fixture
def xla_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `cudnn_attention` call JAX's XLA attention, which runs everywhere."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: plain(*args, **options)
    )


@pytest.fixture
def tpu_mesh(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """Returns four devices of an absent TPU, for which libtpu compiles."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `pip install libtpu` compiles for TPUs without having one")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no search for a TPU in the network
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile as well
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return Mesh(np.array(topology.devices), ("context",))
