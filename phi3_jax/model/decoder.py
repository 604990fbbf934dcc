"""The decoder: attention, MLP, layer, and `Phi3Model`, the one forward that everything else calls."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Num

from phi3_jax.config import Phi3Config
from phi3_jax.model import inputs
from phi3_jax.model.attention import attention
from phi3_jax.model.cache import KVCache, LayerCache, Vectors
from phi3_jax.model.layers import Embedding, Linear, RMSNorm, activation, dropout
from phi3_jax.model.masks import causal_mask
from phi3_jax.model.outputs import BaseModelOutputWithPast
from phi3_jax.model.pretrained import Phi3PreTrainedModel
from phi3_jax.model.rope import apply_rope, rope_tables


class Phi3Attention(nnx.Module):
    """Grouped-query self-attention with fused projections, grouped by key/value head.

    `qkv_proj` holds for each key/value head its G query heads, then its key, then its value; the checkpoint
    holds all queries, then all keys, then all values.
    """

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        groups = config.num_attention_heads // config.num_key_value_heads
        heads = {"kv_heads": config.num_key_value_heads}
        embed = {"embed": config.hidden_size}
        head_dim = {"head_dim": config.head_dim}
        init: dict[str, Any] = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.qkv_proj = Linear(embed, {**heads, "qkv": groups + 2, **head_dim}, **init)
        self.o_proj = Linear({**heads, "groups": groups, **head_dim}, embed, **init)
        self.scale = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array],
        mask: Array,
        past: LayerCache | None,
        keep: int,
        output_attentions: bool,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B kept D"], Array | None, tuple[Vectors, Vectors] | None]:
        """The output at the last `keep` positions, attention weights, and the cached keys and values."""
        qkv = self.qkv_proj(x).astype(x.dtype)  # [B, T, K, G + 2, H]
        queries = apply_rope(qkv[:, -keep:, :, :-2], *(table[:, -keep:] for table in tables))
        keys = apply_rope(qkv[..., -2, :], *tables).swapaxes(1, 2)  # [B, K, T, H]
        values = qkv[..., -1, :].swapaxes(1, 2)
        present = None if past is None else past.write(keys, values)
        out, weights = attention(
            queries,
            *((keys, values) if present is None else present),
            mask[:, :, -keep:],
            scale=self.scale,
            dropout_rate=self.attention_dropout,
            dropout_key=key,
            output_weights=output_attentions,
        )
        return self.o_proj(out).astype(x.dtype), weights, present


class Phi3MLP(nnx.Module):
    """Gated MLP: down(up * act(gate)), gate and up fused."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        embed = {"embed": config.hidden_size}
        mlp = {"mlp": config.intermediate_size}
        init: dict[str, Any] = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.gate_up_proj = Linear(embed, {"gate_up": 2, **mlp}, **init)
        self.down_proj = Linear(mlp, embed, **init)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up = self.gate_up_proj(x).astype(x.dtype)  # [B, T, 2, F]
        gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        return self.down_proj(up * activation(self.hidden_act)(gate)).astype(x.dtype)


class Phi3DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a dropout before its residual add."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.self_attn = Phi3Attention(config, rngs=rngs, dtype=dtype)
        self.mlp = Phi3MLP(config, rngs=rngs, dtype=dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.resid_pdrop = config.resid_pdrop

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array],
        mask: Array,
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
        x = x[:, -keep:] + dropout(attended, self.resid_pdrop, keys[1])
        x = x + dropout(self.mlp(self.post_attention_layernorm(x)), self.resid_pdrop, keys[2])
        return x, weights, present


class Phi3Model(Phi3PreTrainedModel):
    """The Phi-3 decoder without a head.

    Args:
        config: sizes, rope and the rest.
        rngs: for the initial weights; an int is a seed.
        dtype: of parameters and activations; norms, rope, softmax and logits are float32 whatever it is.
    """

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs | int = 0, dtype: Any = jnp.float32):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        dtype = jnp.dtype(dtype)
        activation(config.hidden_act)  # an unknown name fails here, not in the first forward
        self.config = config
        self.remat_policy: Callable[..., bool] | None = None
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            padding_idx=config.pad_token_id,
            std=config.initializer_range,
            rngs=rngs,
            dtype=dtype,
        )
        self.layers = nnx.List(
            [Phi3DecoderLayer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    @property
    def decoder(self) -> "Phi3Model":
        return self

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        rngs: nnx.Rngs | Key[Array, ""] | None = None,
        inv_freq: Float[Array, "..."] | None = None,
        attention_scaling: Float[Array, "..."] | float | None = None,
        rope_length: Int[Array, " B"] | None = None,
        hidden_states_to_keep: int = 0,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder over new tokens, after those in the cache if there is one.

        Args:
            input_ids: token ids; NumPy or JAX.
            attention_mask: 1 for tokens, 0 for padding, of the new tokens [B, T] or of the cached and the new
                ones [B, past + T]; or [B, 1 or N, T, S], used as it is: True where a query sees a key, or
                numbers added to the scores. A cache that is a ring takes masks of the new tokens only.
            position_ids: default: tokens counted along the mask, padding left out.
            past_key_values: the cache so far. Its slots must have room; a full one is an error outside `jit`,
                inside, where its length is not known, make it long enough. A ring always has room for the
                chunk that it was made for.
            inputs_embeds: given instead of `input_ids`.
            use_cache: return a cache; default: only if one was given. Without one, a new one is made with
                room for at least 128 more tokens (make your own with `init_cache`).
            output_attentions: return the probabilities of every layer.
            output_hidden_states: return the embeddings and every layer's output.
            rngs: for dropout, a key or an `nnx.Rngs` with a `dropout` stream; None: no dropout.
            inv_freq: rope frequencies in place of the config's, [rotary_dim / 2] or [B, rotary_dim / 2].
            attention_scaling: factor on cosine and sine in place of the config's, a scalar or [B].
            rope_length: the length by which each row's longrope list (or dynamic base) is chosen. Give a
                prompt's whole length when it comes in chunks. Default: its tokens so far, or what the cache
                was computed with if that is more.
            hidden_states_to_keep: n: give `last_hidden_state` at the last n positions only, and spare the
                last layer the work on the others; 0: at all.

        Raises:
            ValueError: shapes that do not fit, ids outside the vocabulary, a sequence beyond the cache.
        """
        config = self.config
        new = inputs.check(config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.init_cache(new.batch_size, inputs.roomy(new.length))
        where = inputs.locate(new, cache)
        if rope_length is None:
            rope_length = where.tokens if cache is None else jnp.maximum(where.tokens, cache.rope_length)
        rope_length = jnp.asarray(rope_length, jnp.int32)
        if rope_length.shape not in ((), (1,), (new.batch_size,)):
            raise ValueError(
                f"rope_length has shape {rope_length.shape}; expected a number or [{new.batch_size}]"
            )
        rope_length = jnp.broadcast_to(rope_length, (new.batch_size,))
        tables = rope_tables(config, where.position_ids, rope_length, inv_freq, attention_scaling)
        mask = new.mask_4d
        if mask is None:
            mask = causal_mask(where.slots, where.key_slots, where.key_mask, config.sliding_window)

        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        x = jnp.asarray(new.inputs_embeds) if new.input_ids is None else self.embed_tokens(new.input_ids)
        x = dropout(
            x.astype(self.dtype), config.embd_pdrop, None if key is None else jax.random.fold_in(key, 0)
        )

        hidden_states, attentions = [x], []
        keys, values = [], []
        spare = not (output_hidden_states or output_attentions)
        for index, layer in enumerate(self.layers):
            keep = hidden_states_to_keep if spare and index == len(self.layers) - 1 else 0
            past = None if cache is None else cache.layer(index)
            layer_key = None if key is None else jax.random.fold_in(key, index + 1)
            run: Callable[..., Any] = _run_layer
            if self.remat_policy is not None:
                run = jax.checkpoint(run, policy=self.remat_policy, static_argnums=(5, 6))
            x, weights, present = run(layer, x, tables, mask, past, keep, output_attentions, layer_key)
            hidden_states.append(x)
            attentions.append(weights)
            if present is not None:
                keys.append(present[0])
                values.append(present[1])
        x = self.norm(x)
        hidden_states[-1] = x

        if cache is not None:
            cache = replace(
                cache,
                keys=keys,
                values=values,
                length=cache.length + new.length,
                mask=where.key_mask,
                tokens=where.counted,
                rope_length=rope_length,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=x[:, -hidden_states_to_keep:],
            past_key_values=cache if use_cache or use_cache is None else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


@partial(jax.jit, static_argnums=(5, 6))
def _run_layer(
    layer: Phi3DecoderLayer,
    x: Array,
    tables: tuple[Array, Array],
    mask: Array,
    past: LayerCache | None,
    keep: int,
    output_attentions: bool,
    key: Array | None,
) -> tuple[Array, Array | None, tuple[Vectors, Vectors] | None]:
    """One layer, as a function that JAX traces once for all layers; XLA inlines it again."""
    return layer(x, tables, mask, past, keep, output_attentions, key)
