"""Tests the model's products: by the library on a CPU, by XLA elsewhere."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from reference import random_ids, run, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.model import layers
from phi3_jax.model.layers import matmul
from phi3_jax.native import product as products
from phi3_jax.native.product import MOST_ROWS, MOST_ROWS_NARROW
from phi3_jax.native.targets import PRODUCT

pytestmark = pytest.mark.usefixtures("library")


def operands(*rows: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    shapes = ((*rows, 40), (24, 40))
    x, weight = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)


@contextmanager
def no_library() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "is_faster", lambda rows, packed: False)
        yield


def by_xla(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that is compiled without the library."""
    with no_library():
        return jax.jit(lambda *a: function(*a))(*arguments)


def uses_library(function: Callable[..., Any], *arguments: Any) -> bool:
    return PRODUCT in jax.jit(lambda *a: function(*a)).lower(*arguments).as_text()


def test_products_of_bfloat16_use_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "variant", lambda: "avx2")
    for rows in ((1, 1), (MOST_ROWS, 1), (1, MOST_ROWS), (2, 1, 3)):
        assert uses_library(matmul, *operands(*rows))
    for rows in ((0, 1), (1, MOST_ROWS + 1)):
        assert not uses_library(matmul, *operands(*rows))
    x, weight = operands(1, 1)
    assert not uses_library(matmul, x.astype(jnp.float32), weight.astype(jnp.float32))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    assert not uses_library(lambda x, weight: matmul(x, weight, mesh), x, weight)


def test_without_wide_vectors_few_rows_use_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "variant", lambda: "portable")
    assert uses_library(matmul, *operands(MOST_ROWS_NARROW, 1))
    assert not uses_library(matmul, *operands(MOST_ROWS_NARROW + 1, 1))
    assert not products.is_faster(MOST_ROWS_NARROW + 1, packed=True)


@pytest.mark.parametrize("name", ["neon", "neonbf16"])
def test_arm_uses_the_library_for_few_rows_and_packed_weights(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(products, "variant", lambda: name)
    assert products.is_faster(MOST_ROWS_NARROW, packed=False)
    assert not products.is_faster(MOST_ROWS_NARROW + 1, packed=False)
    assert products.is_faster(MOST_ROWS + 1, packed=True)


@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (5, 11)])
def test_product_and_gradient_are_those_of_xla(rows: tuple[int, ...]) -> None:
    def loss(x: Any, weight: Any) -> Any:
        y = matmul(x, weight)
        return jnp.sum(jnp.sin(y)), y

    both = jax.grad(loss, (0, 1), has_aux=True)
    assert uses_library(both, *operands(*rows))
    gradients, y = jax.jit(both)(*operands(*rows))
    expected_gradients, expected = by_xla(both, *operands(*rows))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for found, other in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            *(each.astype(jnp.float32) for each in (found, other)), rtol=2**-7, atol=1e-2
        )


def test_vmap_and_rematerialization() -> None:
    def gradient(x: Any, weight: Any) -> Any:
        return jax.grad(lambda weight: jnp.sum(jax.checkpoint(matmul)(x, weight)))(weight)

    x, weight = operands(3, 1, 2)
    of_rows = jax.vmap(gradient, (0, None))
    found, expected = jax.jit(of_rows)(x, weight), by_xla(of_rows, x, weight)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_for_accelerators_do_not_change(platform: str) -> None:
    def products() -> list[str]:
        traced = jax.jit(lambda x, weight: matmul(x, weight)).trace(*operands(1, 1))
        lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        return [line.split(" = ")[-1] for line in lines if "dot_general" in line or "call" in line]

    found = products()
    assert len(found) == 1
    with no_library():
        assert re.sub("%[a-z_0-9]+", "", found[0]) == re.sub("%[a-z_0-9]+", "", products()[0])


def test_models_agree() -> None:
    """Both round the same weights and activations; only the order of sums differs."""
    model = Phi3ForCausalLM(small_config(), dtype="bfloat16")
    ids = random_ids(model.config, np.ones((2, 6), np.int64))
    assert uses_library(lambda m: m(ids).logits, model)
    found = np.asarray(run(model, input_ids=ids).logits)
    expected = np.asarray(by_xla(lambda m: m(ids).logits, model))
    assert np.sqrt(np.mean(np.square(found - expected))) <= 0.02 * np.sqrt(np.mean(np.square(expected)))


def test_a_row_does_not_depend_on_the_batch() -> None:
    """So that drafts, batches and single prompts round alike."""
    x, weight = operands(50, 1)
    whole = jax.jit(matmul)(x, weight)
    np.testing.assert_array_equal(jax.jit(matmul)(x[3:4], weight), whole[3:4])


def test_exports() -> None:
    """An open number of rows takes XLA; a fixed one names the library, which JAX lets pass only if told."""
    x, weight = operands(2, 1)
    (rows,) = export.symbolic_shape("rows")
    open_rows = jax.ShapeDtypeStruct((rows, 1, 40), jnp.bfloat16)
    program = export.export(jax.jit(matmul))(open_rows, weight)
    assert PRODUCT not in program.mlir_module()
    np.testing.assert_allclose(program.call(x, weight), jax.jit(matmul)(x, weight), rtol=1e-5, atol=1e-5)

    with pytest.raises(ValueError, match=PRODUCT):
        export.export(jax.jit(matmul))(x, weight)
    checks = [export.DisabledSafetyCheck.custom_call(PRODUCT)]
    program = export.export(jax.jit(matmul), disabled_checks=checks)(x, weight)
    np.testing.assert_array_equal(program.call(x, weight), jax.jit(matmul)(x, weight))
    for_tpu = export.export(jax.jit(matmul), platforms=["tpu"])(x, weight)
    assert PRODUCT not in for_tpu.mlir_module()
