"""Rope frequencies that differ by layer, and by key/value head."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError


class LayerFrequencies(NamedTuple):
    """Rope frequencies of each layer or of each key/value head, whose queries share them.

    A forward, `generate` and `Scorer.score` take it as `inv_freq`. It is a pytree: other numbers need no
    other program. Axes before L, and K, may have length 1.

    Args:
        inv_freq: radians per token, [L, P], [L, K, P], for each row [B, L, K, P] or, not in `generate`, for
            each position [B, T, L, K, P].
        attention_scaling: factor on cosine and sine: a number, [L], [L, K] or [B, L, K].
    """

    inv_freq: Float[Array | np.ndarray, "..."]
    attention_scaling: Float[Array | np.ndarray, "..."] | float = 1.0

    def with_all_axes(self, config: Phi3Config, rows: int | None, positions: int = 1) -> "LayerFrequencies":
        """Returns the same frequencies as [B, T, L, K, P], and factors as [B, L, K].

        Axes along which they do not differ may have length 1. With `rows` None, B is any number.

        Raises:
            UserError: a shape does not fit a model of `config`, or these numbers of rows and positions.
        """
        layers, kv_heads, pairs = config.num_hidden_layers, config.num_key_value_heads, config.rotary_dim // 2
        inv_freq, scaling = _array(self.inv_freq), _array(self.attention_scaling)
        shape = inv_freq.shape
        with_axes = {2: (1, 1, *shape[:1], 1, *shape[1:]), 3: (1, 1, *shape), 4: (*shape[:1], 1, *shape[1:])}
        sizes = rows, positions, layers, kv_heads, pairs
        row = "B" if rows is None else rows
        all_axes = with_axes.get(len(shape), shape)
        if not _fits(all_axes, sizes, can_be_one=(True, True, False, True, False)):
            raise UserError(
                f"inv_freq of LayerFrequencies has shape {list(shape)}; expected [{layers}, {pairs}], "
                f"[{layers}, {kv_heads}, {pairs}] or [{row}, {layers}, {kv_heads}, {pairs}]"
                + (f", or [{row}, {positions}, {layers}, {kv_heads}, {pairs}]" if positions > 1 else "")
                + ", for the model's layers, key/value heads and pairs of rotary dims"
            )
        inv_freq = inv_freq.reshape(all_axes)
        shape = scaling.shape
        all_axes = {1: (1, *shape, 1), 2: (1, *shape)}.get(len(shape), shape)
        if not shape:
            return LayerFrequencies(inv_freq, scaling * np.ones((1, layers, 1), np.float32))
        if not _fits(all_axes, (rows, layers, kv_heads), can_be_one=(True, False, True)):
            raise UserError(
                f"attention_scaling of LayerFrequencies has shape {list(shape)}; expected a number, "
                f"[{layers}], [{layers}, {kv_heads}] or [{row}, {layers}, {kv_heads}]"
            )
        return LayerFrequencies(inv_freq, scaling.reshape(all_axes))


def _array(values: Any) -> Any:
    return values if isinstance(values, Array) else np.asarray(values, np.float32)


def _fits(shape: tuple[int, ...], sizes: tuple[int | None, ...], can_be_one: tuple[bool, ...]) -> bool:
    return len(shape) == len(sizes) and all(
        size in (None, length) or (length == 1 and one)
        for length, size, one in zip(shape, sizes, can_be_one, strict=True)
    )
