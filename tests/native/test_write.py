"""The C++ library writes into caches as XLA's updates do, in place."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.cache import layer_cache
from phi3_jax.cache.layer_cache import write_ring, write_row, write_slots
from phi3_jax.native.targets import WRITE
from phi3_jax.native.write import write

pytestmark = pytest.mark.usefixtures("library")


def arrays(dtype: Any, batch: int, length: int, *width: int) -> tuple[jax.Array, jax.Array]:
    draws = np.random.default_rng(0)
    shapes = (batch, 2, 9, *width), (batch, 2, length, *width)
    whole, new = (jnp.asarray(draws.integers(-100, 100, shape), dtype) for shape in shapes)
    return whole, new


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    ("batch", "length", "width"), [(1, 1, (8,)), (3, 4, (8,)), (2, 9, ()), (3, 2, (4, 5))]
)
@pytest.mark.parametrize("function", [write_slots, write_ring])
def test_equals_xla(
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    dtype: str,
    batch: int,
    length: int,
    width: tuple[int, ...],
) -> None:
    whole, new = arrays(dtype, batch, length, *width)
    start = jnp.asarray([5, 2, 7][:batch], jnp.int32)
    start = start if function is write_ring else jnp.minimum(start, 9 - length)
    program = jax.jit(lambda *arrays: function(*arrays))
    assert WRITE in program.lower(whole, new, start).as_text()
    found = program(whole, new, start)
    monkeypatch.setattr(layer_cache, "can_write", lambda slots, new: False)
    np.testing.assert_array_equal(found, jax.jit(lambda *arrays: function(*arrays))(whole, new, start))


@pytest.mark.parametrize("row", [0, 2, 9])
def test_writes_one_row(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """A number beyond the rows means the last one, as in XLA's updates."""
    whole, new = arrays("bfloat16", 3, 4, 8)
    found = write_row(whole, new[:1], jnp.int32(row), jnp.int32(2))
    monkeypatch.setattr(layer_cache, "can_write", lambda slots, new: False)
    np.testing.assert_array_equal(found, write_row(whole, new[:1], jnp.int32(row), jnp.int32(2)))


def test_moves_slots_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, new = arrays("bfloat16", 2, 4, 8)
    start = jnp.asarray([-3, 8], jnp.int32)
    found = write_slots(whole, new, start)
    np.testing.assert_array_equal(found, write_slots(whole, new, jnp.asarray([0, 5], jnp.int32)))


def test_copies_only_if_the_array_is_used_again() -> None:
    whole, new = arrays("bfloat16", 2, 1, 8)
    rows = start = jnp.arange(2, dtype=jnp.int32)
    text = jax.jit(write, donate_argnums=0).lower(whole, new, rows, start).compile().as_text()
    assert "copy(" not in text
    before = np.asarray(whole)
    both = jax.jit(lambda *arrays: (write(*arrays), arrays[0] * 2))(whole, new, rows, start)
    np.testing.assert_array_equal(both[1], before * 2)
    np.testing.assert_array_equal(whole, before)


def test_gradients_equal_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, new = arrays("bfloat16", 2, 3, 8)
    start = jnp.asarray([1, 6], jnp.int32)
    weight = np.random.default_rng(1).integers(-9, 9, whole.shape).astype(jnp.bfloat16)

    def gradients() -> Any:
        def loss(whole: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(write_slots(whole, new, start) * weight).astype(jnp.float32))

        return jax.jit(jax.grad(loss, (0, 1)))(whole, new)

    found = gradients()
    monkeypatch.setattr(layer_cache, "can_write", lambda slots, new: False)
    jax.tree.map(np.testing.assert_array_equal, found, gradients())


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 2, 10, 8), "bfloat16", 2),
        ((2, 3, 4, 8), "bfloat16", 2),
        ((2, 2, 4, 8), "int8", 2),
        ((2, 2, 4, 8), "bfloat16", 3),
    ],
    ids=["length", "heads", "dtype", "rows"],
)
def test_rejects_arrays_that_do_not_fit(shapes: tuple[tuple[int, ...], str, int]) -> None:
    shape, dtype, rows = shapes
    numbers = np.zeros(rows, np.int32)
    with pytest.raises(ValueError, match="do not fit an array bfloat16"):
        jax.eval_shape(
            partial(write), np.zeros((2, 2, 9, 8), jnp.bfloat16), np.zeros(shape, dtype), numbers, numbers
        )
