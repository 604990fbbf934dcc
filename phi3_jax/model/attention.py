"""Attention over grouped heads, by the kernel that fits."""

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.errors import UserError
from phi3_jax.model.kernels.dispatch import attend, attend_on_mesh, choose_kernels
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask


def attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"] | QuantizedVectors | RaggedVectors,
    value: Float[Array, "B K S H"] | QuantizedVectors | RaggedVectors,
    mask: CausalMask | Array,
    *,
    scale: float,
    mesh: Mesh | None = None,
    implementation: str | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    output_weights: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B N T S"] | None]:
    """Softmax attention, scores and softmax in float32.

    Args:
        query, key, value, mask, scale, dropout_rate, dropout_key, output_weights: as in `xla_attention`.
        mesh: divides queries, keys and values; see `attend_on_mesh`.
        implementation: one of `IMPLEMENTATIONS`. What a kernel cannot do (weights, dropout, masks as arrays)
            XLA does.

    Returns:
        The attended values and, if wanted, the probabilities.
    """
    if isinstance(key, RaggedVectors) and isinstance(value, RaggedVectors):
        if output_weights or not isinstance(mask, CausalMask):
            raise UserError("a cache with rows of different sizes gives no attentions and takes no 4-D masks")
        outputs = [
            attention(
                query[rows],
                keys,
                values,
                mask.take_rows(rows, keys.shape[2]),
                scale=scale,
                mesh=mesh,
                implementation=implementation,
            )[0]
            for rows, keys, values in zip(key.rows(), key.parts, value.parts, strict=True)
        ]
        return jnp.concatenate(outputs), None
    assert not isinstance(key, RaggedVectors)
    assert not isinstance(value, RaggedVectors)
    if isinstance(mask, CausalMask):
        mask = mask.without_idle_blocks()
    has_dropout = dropout_key is not None and dropout_rate > 0
    if isinstance(mask, CausalMask) and not output_weights and not has_dropout:
        if mesh is not None:
            return attend_on_mesh(query, key, value, mask, scale, implementation, mesh), None
        kernels = choose_kernels(query, key, mask, implementation)
        if set(kernels.values()) != {"xla"}:
            return attend(query, key, value, mask, scale, kernels), None
    attended = xla_attention(
        query,
        key,
        value,
        mask,
        scale=scale,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        output_weights=output_weights,
    )
    return attended.out, attended.weights
