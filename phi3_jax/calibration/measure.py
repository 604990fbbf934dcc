"""Measures what rounding costs: the perplexity of a text before and after."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from phi3_jax.evaluation.perplexity import perplexity
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.pipeline import Pipeline
from phi3_jax.quantization import FLOATS, Quantization

TOKENS = 8192
"""The most tokens that are scored."""


def measure_rounding(
    source: Path,
    rounded: Path,
    quantization: Quantization,
    tokens: Int[np.ndarray, " T"],
    *,
    dtype: Any,
    length: int,
) -> Iterator[tuple[str, float]]:
    """Yields a name and the perplexity of the original, of its plainly rounded weights, and of `rounded`.

    Args:
        source: the original checkpoint.
        rounded: the calibrated one.
        quantization: of plain rounding.
        tokens: a text that was not calibrated with.
        dtype: of activations, and of floats.
        length: tokens of a window, which moves by half of it.
    """
    for name, path, weights in (
        ("floats", source, FLOATS),
        (f"{quantization}, rounded", source, quantization),
        (f"{quantization}, calibrated", rounded, None),
    ):
        pipeline = Pipeline.load(path, dtype=dtype, quantization=weights)
        yield name, perplexity(Scorer(pipeline.compiled), tokens, length=length).perplexity
