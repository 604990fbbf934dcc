"""The decoder: attention, MLP, layer, and `Phi3Model`, the one forward that everything else calls."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, Num

from phi3_jax.cache.cache import KVCache
from phi3_jax.cache.layer_cache import LayerCache, Vectors
from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.model.arguments import check, locate, refuse
from phi3_jax.model.attention import attention
from phi3_jax.model.layer_stack import StackedLayers, run_layers
from phi3_jax.model.layers import (
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    activation,
    dropout,
    fold_in,
    last_positions,
    scaled,
)
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.outputs import BaseModelOutputWithPast
from phi3_jax.model.pretrained import Phi3PreTrainedModel
from phi3_jax.model.rope import LayerRope, Tables, apply_rope, layer_rope, rope_tables
from phi3_jax.parallel.sharding import check_divides, constrain
from phi3_jax.sizes import round_up

SPARE_SLOTS = 128
"""Slots that a cache made by a forward has beyond its tokens, at least; its size is a multiple."""

LayerOutput = tuple[Float[Array, "B kept D"], Array | None, tuple[Vectors, Vectors] | None]
"""The output at the last `keep` positions (None: all), attention weights, cached keys and values."""


class Phi3Attention(nnx.Module):
    """Grouped-query self-attention with fused projections, grouped by key/value head.

    `qkv_proj` has for each key/value head its G query heads, then its key, then its value. The checkpoint has
    all queries, then all keys, then all values.
    """

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        groups = config.num_attention_heads // config.num_key_value_heads
        heads = {"kv_heads": config.num_key_value_heads}
        embed = {"embed": config.hidden_size}
        head_dim = {"head_dim": config.head_dim}
        init: dict[str, Any] = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype, "mesh": mesh}
        self._add_projections(
            config,
            partial(Linear, embed, {**heads, "qkv": groups + 2, **head_dim}, **init),
            partial(Linear, {**heads, "groups": groups, **head_dim}, embed, **init),
        )
        self.scale = config.attention_scale
        self.mesh = mesh
        self.attn_implementation: str | None = None
        self.attention_dropout = config.attention_dropout

    def _add_projections(
        self, config: Phi3Config, qkv: Callable[..., Linear], output: Callable[..., Linear]
    ) -> None:
        self.qkv_proj = qkv()
        self.o_proj = output()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        mask: CausalMask | Array,
        past: LayerCache | None,
        keep: int | None,
        output_attentions: bool,
        key: Key[Array, ""] | None,
    ) -> LayerOutput:
        qkv = self.qkv_proj(x, fold_in(key, 0)).astype(x.dtype)  # [B, T, K, G + 2, H]
        # Kept flat: a TPU pads head_dim to a multiple of 128.
        qkv = checkpoint_name(qkv.reshape(*qkv.shape[:2], -1), "qkv_proj").reshape(qkv.shape)
        # Split, not sliced: gradients are then concatenated rather than padded with zeros and added.
        queries, keys, values = jax.lax.split(qkv, (qkv.shape[3] - 2, 1, 1), axis=3)
        query_tables = (last_positions(table, keep) for table in tables)
        queries = apply_rope(last_positions(queries, keep), *query_tables)
        keys = apply_rope(keys[..., 0, :], *tables).swapaxes(1, 2)  # [B, K, T, H]
        values = values[..., 0, :].swapaxes(1, 2)
        present = None if past is None else past.write(keys, values, self.mesh)
        # In a prefill the cache holds nothing but these very keys.
        prefill = isinstance(mask, CausalMask) and mask.prefill
        visible = (keys, values) if present is None or prefill else present
        if keep is not None:
            mask = mask.last_queries(keep) if isinstance(mask, CausalMask) else mask[:, :, -keep:]
        out, weights = attention(
            queries,
            *visible,
            mask,
            scale=self.scale,
            mesh=self.mesh,
            implementation=self.attn_implementation,
            dropout_rate=self.attention_dropout,
            dropout_key=key,
            output_weights=output_attentions,
        )
        y = self.o_proj(out, fold_in(key, 1)).astype(x.dtype)
        return checkpoint_name(y, "o_proj"), weights, present


class Phi3MLP(nnx.Module):
    """Gated MLP: down(up * act(gate)), gate and up fused."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        embed = {"embed": config.hidden_size}
        mlp = {"mlp": config.intermediate_size}
        init: dict[str, Any] = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype, "mesh": mesh}
        self.gate_up_proj = Linear(embed, {"gate_up": 2, **mlp}, **init)
        self.down_proj = Linear(mlp, embed, **init)
        activation(config.hidden_act)  # an unknown name fails here, not in the first forward
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        gate_up = self.gate_up_proj(x, fold_in(key, 0)).astype(x.dtype)  # [B, T, 2, F]
        gate_up = checkpoint_name(gate_up, "gate_up_proj")
        gate, up = jax.lax.split(gate_up, (1, 1), axis=-2)
        product = (up * activation(self.hidden_act)(gate))[..., 0, :]
        return self.down_proj(product, fold_in(key, 1)).astype(x.dtype)


class Phi3DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a dropout before its residual add."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        self.self_attn = Phi3Attention(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.mlp: Any = Phi3MLP(config, rngs=rngs, dtype=dtype, mesh=mesh)
        norm: dict[str, Any] = {"eps": config.rms_norm_eps, "dtype": dtype, "mesh": mesh}
        self.input_layernorm: RMSNorm | LayerNorm = RMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm: RMSNorm | LayerNorm = RMSNorm(config.hidden_size, **norm)
        self.resid_attn_pdrop = self.resid_mlp_pdrop = config.resid_pdrop
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        mask: CausalMask | Array,
        past: LayerCache | None = None,
        keep: int | None = None,
        output_attentions: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> LayerOutput:
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        prefill = isinstance(mask, CausalMask) and mask.prefill and keep is None
        axes = ("batch", "length" if prefill else None, "hidden")
        y, weights, present = self.self_attn(
            self.input_layernorm(x), tables, mask, past, keep, output_attentions, keys[0]
        )
        x = last_positions(x, keep)
        x = x + dropout(constrain(y, self.mesh, *axes), self.resid_attn_pdrop, keys[1])
        y = self.mlp(self.post_attention_layernorm(x), fold_in(key, 3))  # after the numbers of `split`
        x = x + dropout(constrain(y, self.mesh, *axes), self.resid_mlp_pdrop, keys[2])
        return x, weights, present


class Phi3Model(Phi3PreTrainedModel):
    """The Phi-3 decoder without a head.

    Args:
        config: sizes, rope and the rest.
        rngs: for the initial weights; an int is a seed.
        dtype: of parameters and activations; norms, rope, softmax and logits are float32 whatever it is.
        mesh: of `phi3_jax.make_mesh`; parameters, activations and caches are divided over it.

    Raises:
        UserError: a config of another family, sizes that the mesh does not divide, an unknown `hidden_act`, a
            rope type of the user's own whose numbers are not finite.
    """

    def __init__(
        self,
        config: Phi3Config,
        *,
        rngs: nnx.Rngs | int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        self.check_config(config)
        check_divides(mesh, config.divided_sizes)
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        dtype = jnp.dtype(dtype)
        config.rope_scaling.check_formula(config.rope_base)
        self.config = config
        self.mesh = mesh
        self.remat_policy: Callable[..., bool] | None = None
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            padding_idx=config.pad_token_id,
            tied=config.tie_word_embeddings,
            std=config.initializer_range,
            rngs=rngs,
            dtype=dtype,
            mesh=mesh,
        )
        self.layers: nnx.List[Phi3DecoderLayer] | StackedLayers = nnx.List(
            [
                self._make_layer(index, rngs=rngs, dtype=dtype, mesh=mesh)
                for index in range(config.num_hidden_layers)
            ]
        )
        self._add_norm(eps=config.rms_norm_eps, dtype=dtype, mesh=mesh)

    def _make_layer(self, index: int, **init: Any) -> Phi3DecoderLayer:
        return Phi3DecoderLayer(self.config, **init)

    def _add_norm(self, **init: Any) -> None:
        self.norm = RMSNorm(self.config.hidden_size, **init)

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
        inv_freq: Float[Array, "..."] | LayerFrequencies | None = None,
        attention_scaling: Float[Array, "..."] | float | None = None,
        rope_length: Int[Array, " B"] | None = None,
        hidden_states_to_keep: int | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder over new tokens, after those in the cache if there is one.

        Args:
            input_ids, inputs_embeds: token ids, in NumPy or JAX, or their embeddings; one of them.
            attention_mask: 1 for tokens, 0 for padding, of the new tokens [B, T] or of the cached and the new
                ones [B, past + T] (not for a ring); or [B, 1 or N, T, S]: True where a query sees a key, or
                numbers added to the scores.
            position_ids: default: tokens counted along the mask, without padding.
            past_key_values: the cache so far, with room for the new tokens; under `jit` this is not checked.
            use_cache: return a cache; default: if one was given. Without one, a new one is made with room
                for at least 128 more tokens (see `init_cache`).
            output_attentions, output_hidden_states: return every layer's probabilities or outputs.
            rngs: for dropout, a key or an `nnx.Rngs` with a `dropout` stream; None: no dropout.
            inv_freq: rope frequencies in place of the config's, [rotary_dim / 2], [B, rotary_dim / 2] or, for
                each new token, [B, T, rotary_dim / 2]; `LayerFrequencies` for each layer or key/value head.
            attention_scaling: factor on cosine and sine in place of the config's, a scalar or [B].
            rope_length: the length by which each row's frequencies are chosen, such as the whole prompt's
                when it comes in chunks. Default: its tokens so far, or the cache's `rope_length` if greater.
            hidden_states_to_keep: return the last n positions only, and compute no others in the last layer;
                None: all positions.
            segment_ids: the number of every token's example in rows that hold several, 0 for padding. Tokens
                see only their own example, and positions restart at 0 in each. All examples of a row share
                the frequencies of the longest unless `rope_length` is given. Without a cache only.
            others: arguments of transformers that ask for nothing, such as `return_dict=True`.

        Raises:
            UserError: shapes that do not fit, ids outside the vocabulary, too many tokens for the cache, an
                argument of transformers that is not supported.
            TypeError: there is no such argument.
        """
        refuse(others)
        arguments = input_ids, inputs_embeds, attention_mask, position_ids, segment_ids
        new, cache = check(self.config, past_key_values, *arguments), past_key_values
        if cache is None and use_cache:
            new.refuse_segments()
            cache = self.init_cache(new.batch_size, round_up(new.length + SPARE_SLOTS, SPARE_SLOTS))
        where = locate(new, past_key_values, self.config, rope_length)
        length_axis = "length" if where.prefill else None
        check_divides(self.mesh, {"batch": new.batch_size, "length": new.length if where.prefill else 0})

        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        x = jnp.asarray(new.inputs_embeds) if new.input_ids is None else self.embed_tokens(new.input_ids)
        x = constrain(x.astype(self.dtype), self.mesh, "batch", length_axis, "hidden")
        x = scaled(dropout(x, self.config.embd_pdrop, fold_in(key, 0)), self.config.embedding_multiplier)
        rope: Tables | LayerRope
        if isinstance(inv_freq, LayerFrequencies):
            rope = layer_rope(self.config, where.position_ids, inv_freq, attention_scaling)
        else:
            rope = rope_tables(
                self.config, where.position_ids, where.rope_length, inv_freq, attention_scaling
            )
        states, attentions, present = run_layers(
            self.layers,
            x,
            rope,
            where.mask,
            cache,
            keep=None if output_hidden_states or output_attentions else hidden_states_to_keep,
            output_attentions=output_attentions,
            key=key,
            remat_policy=self.remat_policy,
        )
        last = self.norm(states[-1])
        if cache is not None:
            extension = new.length, where.key_mask, where.tokens, where.rope_length
            cache = cache.extend(present, *extension).constrain(self.mesh)
        return BaseModelOutputWithPast(
            last_hidden_state=last_positions(last, hidden_states_to_keep),
            past_key_values=cache if use_cache or use_cache is None else None,
            hidden_states=(x, *states[:-1], last) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
