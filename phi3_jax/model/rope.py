"""Rotary position embeddings: cosines and sines of each position, and the rotation of heads."""

from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model.layers import scaled

Tables: TypeAlias = tuple[Array, Array]
"""Cosines and sines, [B, T, half] or, for each key/value head, [B, T, K, half]."""


def rope_tables(
    config: Phi3Config,
    position_ids: Int[Array, "B T"],
    rope_length: Int[Array, " B"],
    inv_freq: Float[Array, "..."] | None = None,
    attention_scaling: Float[Array, "..."] | float | None = None,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Returns cosines and sines of every position, float32, times the attention factor.

    Args:
        config: its rope type gives the frequencies and the factor that are not passed.
        position_ids: positions in each row.
        rope_length: the length of each row, on which its frequencies may depend.
        inv_freq: frequencies in place of the config's, [rotary_dim / 2], [B, rotary_dim / 2] or, for each
            position, [B, T, rotary_dim / 2].
        attention_scaling: factor on cosine and sine in place of the config's, a scalar or [B].
    """
    own_inv_freq, own_scaling = config.rope_scaling.frequencies(config.rope_base, rope_length)
    half = config.rotary_dim // 2
    frequencies = jnp.asarray(own_inv_freq if inv_freq is None else inv_freq, jnp.float32)
    scaling = jnp.asarray(own_scaling if attention_scaling is None else attention_scaling, jnp.float32)
    batch, length = position_ids.shape
    if frequencies.shape not in ((half,), (1, half), (batch, half), (batch, length, half)):
        raise UserError(
            f"inv_freq has shape {frequencies.shape}; expected [{half}], [{batch}, {half}] or "
            f"[{batch}, {length}, {half}], half of the {config.rotary_dim} rotary dims"
        )
    if frequencies.ndim < 3:
        frequencies = jnp.atleast_2d(frequencies)[:, None, :]
    if scaling.shape not in ((), (1,), (batch,)):
        raise UserError(f"attention_scaling has shape {scaling.shape}; expected a number or [{batch}]")
    angles = scaled(position_ids.astype(jnp.float32), config.position_scale)[..., None] * frequencies
    scaling = scaling.reshape(-1, 1, 1)
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRope:
    """Positions, and the frequencies of every layer.

    Each layer computes its own tables, so that memory holds those of one layer, also in a backward pass.
    """

    position_ids: Float[Array, "B T"]
    inv_freq: Float[Array, "#B #T L #K P"]
    attention_scaling: Float[Array, "#B L #K"]

    def tables(self, layer: int | Int[Array, ""]) -> Tables:
        """Returns cosines and sines of a layer, [B, T, K or 1, half], float32, times its factors."""
        inv_freq = jax.lax.dynamic_index_in_dim(self.inv_freq, layer, axis=2, keepdims=False)
        scaling = jax.lax.dynamic_index_in_dim(self.attention_scaling, layer, axis=1, keepdims=False)
        angles = self.position_ids[..., None, None] * inv_freq
        scaling = scaling[:, None, :, None]
        return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def layer_rope(
    config: Phi3Config,
    position_ids: Int[Array, "B T"],
    frequencies: LayerFrequencies,
    attention_scaling: object = None,
) -> LayerRope:
    """Returns the rope of all layers, whose frequencies replace the config's.

    Raises:
        UserError: shapes that do not fit, or an `attention_scaling` beside that of `frequencies`.
    """
    if attention_scaling is not None:
        raise UserError("LayerFrequencies has its own attention_scaling; give no other")
    rows, length = position_ids.shape
    whole = frequencies.with_all_axes(config, rows, length)
    return LayerRope(
        scaled(position_ids.astype(jnp.float32), config.position_scale),
        jnp.asarray(whole.inv_freq, jnp.float32),
        jnp.asarray(whole.attention_scaling, jnp.float32),
    )


def apply_rope(
    x: Float[Array, "B T ..."], cos: Float[Array, "B T ..."], sin: Float[Array, "B T ..."]
) -> Float[Array, "B T ..."]:
    """Rotates the leading dims of each head, split in halves (GPT-NeoX order); the others do not change.

    `x` is [B, T, heads..., H]; `cos` and `sin` are [B, T, half] or, by the first axis of heads,
    [B, T, K or 1, half], and cover the 2 * half <= H rotary dims.
    """
    half = cos.shape[-1]
    heads = (1,) * (x.ndim - cos.ndim)
    cos = cos.reshape(*cos.shape[:-1], *heads, half).astype(x.dtype)
    sin = sin.reshape(*sin.shape[:-1], *heads, half).astype(x.dtype)
    first, second, rest = jax.lax.split(x, (half, half, x.shape[-1] - 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
