"""Tests small integers in words, by hand and at random."""

import numpy as np
import pytest
from quantized_files import words

from phi3_jax.checkpoint import packing
from phi3_jax.checkpoint.packing import input_order, pack_columns, unpack_columns


def test_first_integer_has_the_lowest_bits() -> None:
    four = np.array([[0x76543210, 0x0EDCBA98]], np.int32)
    np.testing.assert_array_equal(unpack_columns(four, 4, 15), [np.arange(15) - 8])
    np.testing.assert_array_equal(pack_columns(np.arange(15, dtype=np.int8)[None] - 8, 4), four)
    eight = np.array([0x7F80FF00], np.uint32).view(np.int32)[None]
    np.testing.assert_array_equal(unpack_columns(eight, 8, 4), [[-128, 127, 0, -1]])
    np.testing.assert_array_equal(pack_columns(np.array([[-128, 127, 0, -1]], np.int8), 8), eight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_packs_and_unpacks_any_shape(monkeypatch: pytest.MonkeyPatch, bits: int, block: int) -> None:
    monkeypatch.setattr(packing, "BLOCK", block)
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    for rows, columns in rng.integers(1, 70, (20, 2)):
        values = rng.integers(-half, half, (rows, columns)).astype(np.int8)
        stored = pack_columns(values, bits)
        np.testing.assert_array_equal(stored, words(values.astype(int) + half, bits))
        np.testing.assert_array_equal(unpack_columns(stored, bits, columns), values)
        transposed = np.ascontiguousarray(stored.T).T
        np.testing.assert_array_equal(unpack_columns(transposed, bits, columns), values)


def test_sorts_inputs_by_group() -> None:
    np.testing.assert_array_equal(input_order(np.array([1, 0, 2, 1, 2, 0]), 3), [1, 5, 0, 3, 2, 4])
    assert input_order(np.array([0, 0, 1, 1]), 2) is None
    for wrong, says in (
        ([0, 0, 1, 2], "places input 3 in group 2; expected 0 to 1"),
        ([0, -1, 1, 1], "places input 1 in group -1"),
        ([0, 1, 1, 1], "gives group 0 1 inputs; expected 2"),
    ):
        with pytest.raises(ValueError, match=says):
            input_order(np.array(wrong), 2)
