"""A stand-in for the model's steps: an MLP with stacked layers, divided over fsdp and tensor."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi3_jax.plan import AbstractStep, Work

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install 'phi3-jax[tpu]'"
)

LAYERS, HIDDEN, FFN = 5, 1024, 2048


def toy_step(work: Work, mesh: Mesh) -> AbstractStep:
    """Builds a training step on `work.batch * work.seq` vectors."""

    def struct(*shape: int, spec: tuple[object, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    weights = {
        "up": struct(LAYERS, FFN, HIDDEN, spec=(None, "tensor", "fsdp")),
        "down": struct(LAYERS, HIDDEN, FFN, spec=(None, "fsdp", "tensor")),
    }
    x = struct(work.batch * work.seq, HIDDEN, spec=(("data", "fsdp"), None))

    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return x + jax.nn.silu(x @ w["up"].T) @ w["down"].T, None

        return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32)).mean()

    def step(weights: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        gradients = jax.grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: (w - 1e-3 * g).astype(w.dtype), weights, gradients)

    shardings = jax.tree.map(lambda w: w.sharding, weights)
    function = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return AbstractStep(function, (weights, x), {"parameters": weights, "batch": x})
