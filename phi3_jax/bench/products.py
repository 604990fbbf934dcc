"""Measures the products of a decode step alone, and how fast this machine reads as many bytes."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.lora.adapters import projections
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import Linear

PASSES = 8
"""How often the products of a step are computed, and as many bytes are read."""


class Speeds(NamedTuple):
    """The bytes a second of the weights that are multiplied, and of memory that is only read."""

    products: float
    memory: float


class ProductSpeed:
    """The speed of a model's products with `rows` rows, on the CPU."""

    def __init__(self, model: Phi3ForCausalLM, rows: int):
        self._model = model
        linears = [linear for _, linear in projections(model)]
        dtype, draws = model.model.norm.weight[...].dtype, np.random.default_rng(0)
        self._inputs = {
            shape: jnp.asarray(draws.normal(size=(rows, 1, *shape)), dtype)
            for shape in {_input_shape(linear) for linear in linears}
        }
        weights = [linear.weight for linear in linears] + [model.get_output_embeddings().weight]
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves([w.get_value() for w in weights]))
        self._memory = np.ones(max(1, self._bytes // 8), np.int64)  # zeros would share one page
        self._products = jax.jit(_products)

    def measure(self) -> Speeds:
        """Returns the speeds; the weights are larger than the caches together."""
        start = time.perf_counter()
        jax.block_until_ready(self._products(self._model, self._inputs))
        multiplied = time.perf_counter()
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            for _ in range(PASSES):
                list(pool.map(np.max, np.array_split(self._memory, 8 * threads)))
        read = time.perf_counter()
        return Speeds(
            PASSES * self._bytes / (multiplied - start), PASSES * self._memory.nbytes / (read - started)
        )


def _input_shape(linear: Linear) -> tuple[int, ...]:
    return tuple(size for _, size in linear.inputs)


def _products(model: Phi3ForCausalLM, inputs: dict[tuple[int, ...], jax.Array]) -> Any:
    """Computes all products several times, each after the one before, as in decode steps."""

    def after(x: jax.Array, y: jax.Array) -> jax.Array:
        return x + (1e-30 * y[0]).astype(x.dtype)

    def one_pass(_: Any, last: jax.Array) -> jax.Array:
        for _, linear in projections(model):
            last = linear.product(after(inputs[_input_shape(linear)], last)).ravel()[:1]
        return model.logits(after(inputs[(model.config.hidden_size,)], last)).ravel()[:1]

    return jax.lax.fori_loop(0, PASSES, one_pass, jnp.zeros(1, jnp.float32))
