"""One decoder layer: attention, MLP, norms and residuals."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from phi3_jax.cache.cache import LayerCache, Vectors
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.model.attention import attention
from phi3_jax.model.layers import Linear, RMSNorm, activation, dropout
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.rope import apply_rope
from phi3_jax.parallel.sharding import constrain


class Phi3Attention(nnx.Module):
    """Grouped-query self-attention with fused projections, grouped by key/value head.

    `qkv_proj` holds for each key/value head its G query heads, then its key, then its value; the checkpoint
    holds all queries, then all keys, then all values.
    """

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        groups = config.num_attention_heads // config.num_key_value_heads
        heads = {"kv_heads": config.num_key_value_heads}
        embed = {"embed": config.hidden_size}
        head_dim = {"head_dim": config.head_dim}
        init: dict[str, Any] = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype, "mesh": mesh}
        self.qkv_proj = Linear(embed, {**heads, "qkv": groups + 2, **head_dim}, **init)
        self.o_proj = Linear({**heads, "groups": groups, **head_dim}, embed, **init)
        self.scale = config.head_dim**-0.5
        self.mesh = mesh
        self.implementation: str | None = None
        self.attention_dropout = config.attention_dropout

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array],
        mask: CausalMask | Array,
        past: LayerCache | None,
        keep: int,
        output_attentions: bool,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B kept D"], Array | None, tuple[Vectors, Vectors] | None]:
        """The output at the last `keep` positions, attention weights, and the cached keys and values."""
        qkv = self.qkv_proj(x).astype(x.dtype)  # [B, T, K, G + 2, H]
        # Split, not sliced: gradients are then put together rather than each padded with zeros and added.
        queries, keys, values = jax.lax.split(qkv, (qkv.shape[3] - 2, 1, 1), axis=3)
        queries = apply_rope(queries[:, -keep:], *(table[:, -keep:] for table in tables))
        keys = apply_rope(keys[..., 0, :], *tables).swapaxes(1, 2)  # [B, K, T, H]
        values = values[..., 0, :].swapaxes(1, 2)
        present = None if past is None else past.write(keys, values, self.mesh)
        alone = isinstance(mask, CausalMask) and mask.fresh  # nothing lies in the cache but these very keys
        seen = (keys, values) if present is None or alone else present
        out, weights = attention(
            queries,
            *seen,
            mask.last_queries(keep) if isinstance(mask, CausalMask) else mask[:, :, -keep:],
            scale=self.scale,
            mesh=self.mesh,
            implementation=self.implementation,
            dropout_rate=self.attention_dropout,
            dropout_key=key,
            output_weights=output_attentions,
        )
        return self.o_proj(out).astype(x.dtype), weights, present


class Phi3MLP(nnx.Module):
    """Gated MLP: down(up * act(gate)), gate and up fused."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        embed = {"embed": config.hidden_size}
        mlp = {"mlp": config.intermediate_size}
        init: dict[str, Any] = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype, "mesh": mesh}
        self.gate_up_proj = Linear(embed, {"gate_up": 2, **mlp}, **init)
        self.down_proj = Linear(mlp, embed, **init)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up = self.gate_up_proj(x).astype(x.dtype)  # [B, T, 2, F]
        gate, up = jax.lax.split(gate_up, (1, 1), axis=-2)
        return self.down_proj((up * activation(self.hidden_act)(gate))[..., 0, :]).astype(x.dtype)


class Phi3DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a dropout before its residual add."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        self.self_attn = Phi3Attention(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.mlp = Phi3MLP(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, mesh=mesh)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, mesh=mesh
        )
        self.resid_pdrop = config.resid_pdrop
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array],
        mask: CausalMask | Array,
        past: LayerCache | None = None,
        keep: int = 0,
        output_attentions: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B kept D"], Array | None, tuple[Vectors, Vectors] | None]:
        """The output at the last `keep` positions (0: at all), attention weights, and the new cache."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        attended, weights, present = self.self_attn(
            self.input_layernorm(x), tables, mask, past, keep, output_attentions, keys[0]
        )
        length = "length" if isinstance(mask, CausalMask) and mask.fresh and not keep else None
        attended = constrain(attended, self.mesh, "batch", length, "hidden")
        x = x[:, -keep:] + dropout(attended, self.resid_pdrop, keys[1])
        made = constrain(self.mlp(self.post_attention_layernorm(x)), self.mesh, "batch", length, "hidden")
        x = x + dropout(made, self.resid_pdrop, keys[2])
        return x, weights, present
