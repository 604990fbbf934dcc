"""Tests rounding for given inputs against plain rounding and a slow form of the algorithm."""

import numpy as np
import pytest

from phi3_jax.errors import UserError
from phi3_jax.quantization import Quantization, gptq, round_weight


@pytest.fixture(scope="module")
def inputs():
    """Correlated inputs of unequal size; one is always zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 64)) + 0.3 * rng.normal(size=(400, 64))
    x *= np.geomspace(0.1, 3, 64)[rng.permutation(64)]
    x[:, 5] = 0
    return x


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)


@pytest.mark.parametrize(
    "text", ["int4:group_size=16", "int4:group_size=32,symmetric=false", "int4:group_size=none"]
)
def test_errors_of_products_are_smaller(inputs, weight, text):
    quantization = Quantization.parse(text)

    def error(stored):
        return np.linalg.norm(inputs @ (stored.dequantize() - weight).T)

    found = gptq.round_for_inputs(weight, inputs.T @ inputs, quantization, "w")
    plain = round_weight(weight, quantization, "w")
    np.testing.assert_array_equal(found.scale, plain.scale)
    assert found.form == plain.form
    assert error(found) < 0.6 * error(plain)


def test_equals_the_algorithm_one_column_at_a_time(inputs, weight, monkeypatch):
    """The inverse is updated after each column by equation 3 of the paper; nothing is factored."""
    quantization = Quantization(4, 16, symmetric=False)
    products = inputs.T @ inputs
    monkeypatch.setattr(gptq, "BLOCK", 24)
    found = gptq.round_for_inputs(weight, products, quantization, "w")
    scale, zero = (np.repeat(each, 16, axis=1) for each in (found.scale, found.zero))
    rest, values = weight.astype(np.float64), np.empty(weight.shape)
    inverse = np.linalg.inv(products + gptq.DAMPING * np.diag(products).mean() * np.eye(64))
    for column in np.argsort(-np.diag(products), kind="stable"):
        values[:, column] = np.clip(np.rint(rest[:, column] / scale[:, column] + zero[:, column]), -8, 7)
        error = rest[:, column] - (values[:, column] - zero[:, column]) * scale[:, column]
        rest = rest - np.outer(error, inverse[column]) / inverse[column, column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # done: its row and column are zeros
    assert np.mean(values != found.values) < 0.002  # ties


def test_rejects_inputs_that_are_not_finite(weight):
    with pytest.raises(UserError, match="down_proj gets inputs that are not finite"):
        gptq.round_for_inputs(weight, np.full((64, 64), np.nan), Quantization(4, 16), "down_proj")


def test_inputs_of_zeros_round_plainly(weight):
    quantization = Quantization(4, 16)
    found = gptq.round_for_inputs(weight, np.zeros((64, 64)), quantization, "w")
    np.testing.assert_array_equal(found.values, round_weight(weight, quantization, "w").values)
