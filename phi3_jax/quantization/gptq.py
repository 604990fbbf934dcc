"""Rounding that keeps the products with given inputs (GPTQ, Frantar et al. 2022)."""

import numpy as np
from jaxtyping import Float

from phi3_jax.errors import UserError
from phi3_jax.quantization.scheme import Quantization
from phi3_jax.quantization.stored import StoredWeight, choose_scales, limits

DAMPING = 0.01
"""What is added to the diagonal of the inputs' products, relative to its mean (section 3.3, step 3)."""

BLOCK = 128
"""The columns after which the rest of the weight is corrected (step 2)."""


def round_for_inputs(
    weight: Float[np.ndarray, "out in"],
    products: Float[np.ndarray, "in in"],
    quantization: Quantization,
    name: str,
) -> StoredWeight:
    """Rounds a weight column by column, and corrects the columns to come for each column's error.

    Columns come in the order of their inputs' squares, largest first. The scales are those of plain rounding,
    so that this order does not show in the result.

    Args:
        weight: of any float dtype.
        products: the sum of x x^T over the inputs x that the weight is multiplied with.
        quantization: says how.
        name: the weight's name, for messages.

    Raises:
        UserError: the groups do not divide the inputs, or numbers or products are not finite.
    """
    if not np.isfinite(products).all():
        raise UserError(f"{name} gets inputs that are not finite, so that it cannot be rounded for them")
    out, columns = weight.shape
    form = quantization.form(name, columns)
    groups = form.groups
    scale, zero = choose_scales(weight.astype(np.float32).reshape(out, groups, -1), quantization, name)
    order = np.argsort(-np.diag(products), kind="stable")
    rest = np.ascontiguousarray(weight.astype(np.float32).T[order])  # [in, out]
    factor = _factor(products[np.ix_(order, order)])
    group_of = order // (columns // groups)
    values = np.empty((columns, out), np.int8)
    low, high = limits(quantization)
    divisor = np.ascontiguousarray(scale.T)  # [groups, out]
    zeros = None if zero is None else np.ascontiguousarray(zero.T)
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        part, errors = rest[block], np.empty_like(rest[block])
        corner = factor[block, block]
        for index in range(len(part)):
            group = group_of[start + index]
            shift = np.float32(0) if zeros is None else zeros[group]
            rounded = np.clip(np.rint(part[index] / divisor[group] + shift), low, high)
            values[start + index] = rounded
            errors[index] = (part[index] - (rounded - shift) * divisor[group]) / corner[index, index]
            part[index + 1 :] -= corner[index, index + 1 :, None] * errors[index]
        rest[block.stop :] -= factor[block, block.stop :].T @ errors
    own = np.empty_like(values)
    own[order] = values
    return StoredWeight(
        np.ascontiguousarray(own.T),
        scale,
        quantization.bits,
        zero=zero,
        int8_activations=form.int8_activations,
    )


def _factor(products: Float[np.ndarray, "in in"]) -> Float[np.ndarray, "in in"]:
    """Returns the upper Cholesky factor of the inverse of the damped products, float32."""
    damped = products.astype(np.float64)
    diagonal = np.diag(damped)
    damped[np.diag_indices_from(damped)] += DAMPING * diagonal.mean() if diagonal.any() else 1.0
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
