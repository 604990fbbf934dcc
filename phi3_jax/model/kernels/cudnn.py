"""cuDNN's attention on NVIDIA GPUs, through JAX."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from phi3_jax.model.masks import CausalMask

WIDEST_HEAD = 128
"""The widest head that every supported GPU takes; Hopper and later take 256."""


def supported(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether cuDNN takes these heads and is installed; check before `cudnn_attention` is traced.

    JAX looks for cuDNN while it traces. Where none is installed, the call fails even in an unused branch of
    `platform_dependent`, so a program for GPUs must do without it.
    """
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= WIDEST_HEAD
    return fits and _installed()


@cache
def _installed() -> bool:
    example = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(
            partial(jax.nn.dot_product_attention, implementation="cudnn"), example, example, example
        )
    except RuntimeError:  # JAX raises this where cuDNN is absent
        return False
    return True


def cudnn_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: CausalMask,
    *,
    scale: float,
) -> Float[Array, "B T K G H"]:
    """Softmax attention of queries over their own keys, or over a cache.

    A cache is transposed, because JAX lets cuDNN read [B, S, K, H] only. The copy pays for a chunk of a
    prompt, not for a decode step. The result of a padding query is finite and meaningless.
    """
    batch, length, _, _, width = query.shape
    arrays = query.reshape(batch, length, -1, width), key.swapaxes(1, 2), value.swapaxes(1, 2)
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    if not mask.prefill:
        out = attend(*arrays, mask=mask.dense())
    elif mask.key_segments is not None or (mask.window is not None and mask.window < length):
        # Padding between tokens counts towards the window, so only a mask is exact, as it is for segments; it
        # takes 33 MB a row at 4,096 tokens. With a mask, cuDNN has a backward pass for even lengths only.
        padded = [jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in arrays]
        visible = jnp.pad(mask.dense(), ((0, 0), (0, 0), (0, length % 2), (0, length % 2)))
        out = attend(*padded, mask=visible, is_causal=True)[:, :length]
    else:
        # Padding is moved after the tokens, which keep their order. Causality then hides the padding, and no
        # mask of T x S is needed.
        order = jnp.argsort(~mask.key_mask, axis=1, stable=True)
        moved = [jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in arrays]
        out = attend(*moved, is_causal=True)
        out = jnp.take_along_axis(out, jnp.argsort(order, axis=1)[:, :, None, None], axis=1)
    return out.reshape(query.shape)
