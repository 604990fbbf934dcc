"""`Phi3Model`, the one forward that everything else calls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, Num

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model import inputs
from phi3_jax.model.decoder_layer import Phi3DecoderLayer
from phi3_jax.model.layer_stack import StackedLayers, run_layers
from phi3_jax.model.layers import Embedding, RMSNorm, activation, dropout
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.outputs import BaseModelOutputWithPast
from phi3_jax.model.pretrained import Phi3PreTrainedModel
from phi3_jax.model.rope import rope_tables
from phi3_jax.parallel.sharding import check_divides, constrain


class Phi3Model(Phi3PreTrainedModel):
    """The Phi-3 decoder without a head.

    Args:
        config: sizes, rope and the rest.
        rngs: for the initial weights; an int is a seed.
        dtype: of parameters and activations; norms, rope, softmax and logits are float32 whatever it is.
        mesh: of `phi3_jax.make_mesh`; parameters, activations and caches are divided over it.

    Raises:
        ValueError: sizes that the mesh does not divide, an unknown `hidden_act`.
    """

    def __init__(
        self,
        config: Phi3Config,
        *,
        rngs: nnx.Rngs | int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        check_divides(mesh, config.divided_sizes)
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        dtype = jnp.dtype(dtype)
        activation(config.hidden_act)  # an unknown name fails here, not in the first forward
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
                Phi3DecoderLayer(config, rngs=rngs, dtype=dtype, mesh=mesh)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, mesh=mesh)

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
        segment_ids: Int[Array, "B T"] | None = None,
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
            inv_freq: rope frequencies in place of the config's, [rotary_dim / 2], [B, rotary_dim / 2] or, for
                each new token its own, [B, T, rotary_dim / 2].
            attention_scaling: factor on cosine and sine in place of the config's, a scalar or [B].
            rope_length: the length by which each row's longrope list (or dynamic base) is chosen. Give a
                prompt's whole length when it comes in chunks. Default: its tokens so far, or what the cache
                was computed with if that is more.
            hidden_states_to_keep: n: give `last_hidden_state` at the last n positions only, and spare the
                last layer the work on the others; 0: at all.
            segment_ids: rows that hold several examples, each side by side: the number of every token's
                example, 0 for padding (with an `attention_mask`, what either calls padding is). Tokens see
                only their own example, and positions restart at 0 where another begins. One longrope list
                still serves the whole row, that of its longest example unless `rope_length` says otherwise.
                Without a cache only.

        Raises:
            ValueError: shapes that do not fit, ids outside the vocabulary, a sequence beyond the cache,
                `segment_ids` together with a cache or a 4-D mask.
        """
        config = self.config
        past = past_key_values
        if segment_ids is not None and (past is not None or use_cache):
            raise UserError(
                "segment_ids go without a cache, whose slots are one example's: leave out past_key_values "
                "and use_cache, and give each example a row of its own to continue it"
            )
        new = inputs.check(config, input_ids, inputs_embeds, attention_mask, position_ids, past, segment_ids)
        where = inputs.locate(new, past)
        if rope_length is None:
            rope_length = where.tokens if past is None else jnp.maximum(where.tokens, past.rope_length)
        rope_length = jnp.asarray(rope_length, jnp.int32)
        if rope_length.shape not in ((), (1,), (new.batch_size,)):
            raise UserError(
                f"rope_length has shape {rope_length.shape}; expected a number or [{new.batch_size}]"
            )
        rope_length = jnp.broadcast_to(rope_length, (new.batch_size,))
        tables = rope_tables(config, where.position_ids, rope_length, inv_freq, attention_scaling)
        fresh = past is None
        mask: CausalMask | Array | None = new.mask_4d
        if mask is None:
            mask = CausalMask(
                where.slots,
                where.key_slots,
                where.key_mask,
                config.sliding_window,
                fresh,
                where.segments,
                where.segments,
            )
        length = "length" if fresh and new.mask_4d is None else None
        check_divides(self.mesh, {"batch": new.batch_size} | ({length: new.length} if length else {}))
        cache, key_mask = past, where.key_mask
        if fresh and use_cache:
            cache = self.init_cache(new.batch_size, inputs.roomy(new.length))
            key_mask = jnp.pad(key_mask, ((0, 0), (0, cache.max_length - new.length)))

        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        x = jnp.asarray(new.inputs_embeds) if new.input_ids is None else self.embed_tokens(new.input_ids)
        x = constrain(x.astype(self.dtype), self.mesh, "batch", length, "hidden")
        x = dropout(x, config.embd_pdrop, None if key is None else jax.random.fold_in(key, 0))

        spare = not (output_hidden_states or output_attentions)
        states, attentions, present = run_layers(
            self.layers,
            x,
            tables,
            mask,
            cache,
            keep=hidden_states_to_keep if spare else 0,
            output_attentions=output_attentions,
            key=key,
            remat_policy=self.remat_policy,
        )
        last = self.norm(states[-1])

        if cache is not None:
            cache = replace(
                cache,
                keys=[keys for keys, _ in present],
                values=[values for _, values in present],
                length=cache.length + new.length,
                mask=key_mask,
                tokens=where.counted,
                rope_length=rope_length,
            ).constrain(self.mesh)
        return BaseModelOutputWithPast(
            last_hidden_state=last[:, -hidden_states_to_keep:],
            past_key_values=cache if use_cache or use_cache is None else None,
            hidden_states=(x, *states[:-1], last) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
