"""Phi-3-small: the parts that differ from Phi-3's, and its model classes.

The formulas are those of Microsoft's remote code. Norms and all projections but the head have a bias, the
MLP's activation is gegelu, and the attention of some layers is block-sparse. muP's multipliers scale
embeddings, scores and logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.phi3small_config import Phi3SmallConfig
from phi3_jax.errors import UserError
from phi3_jax.model.arguments import is_concrete
from phi3_jax.model.decoder import LayerOutput, Phi3Attention, Phi3DecoderLayer, Phi3Model
from phi3_jax.model.heads import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification
from phi3_jax.model.layers import LayerNorm, Linear, fold_in
from phi3_jax.model.masks import CausalMask

LEAST = float(np.finfo(np.float32).min)
"""The logit of a dummy token."""


def gegelu(a: Float[Array, "..."], b: Float[Array, "..."], limit: float | None) -> Float[Array, "..."]:
    """Returns a * sigmoid(1.702 a) * (b + 1), after a is clipped from above and b from both sides.

    Infinite numbers are not clipped.
    """
    if limit is not None:
        a = jnp.where(jnp.isinf(a), a, jnp.minimum(a, limit))
        b = jnp.where(jnp.isinf(b), b, jnp.clip(b, -limit, limit))
    return a * jax.nn.sigmoid(1.702 * a) * (b + 1)


def bias_bound(inputs: int) -> float:
    """Returns the bound of new biases of a layer, which the remote code leaves as PyTorch draws them."""
    return inputs**-0.5


class Phi3SmallSelfAttention(Phi3Attention):
    """Phi-3's attention with biases; in sparse layers each head sees some blocks of keys only.

    The checkpoint has the rows of `query_key_value` by key/value head, as the parameter has them. Phi-3's
    forward finds both projections by Phi-3's names, which are properties here, so that each is stored once.
    """

    def __init__(self, config: Phi3Config, *, is_sparse: bool, **init: Any):
        super().__init__(config, **init)
        self.is_sparse = is_sparse
        if is_sparse:
            self.attention_dropout = 0.0

    def _add_projections(
        self, config: Phi3Config, qkv: Callable[..., Linear], output: Callable[..., Linear]
    ) -> None:
        bound = bias_bound(config.hidden_size)  # the heads together are as wide
        self.query_key_value = qkv(bias=True, bias_bound=bound)
        self.dense = output(bias=True, bias_bound=bound)

    @property
    def qkv_proj(self) -> Linear:  # type: ignore[override]
        return self.query_key_value

    @property
    def o_proj(self) -> Linear:  # type: ignore[override]
        return self.dense

    def __call__(
        self, x: Float[Array, "B T D"], tables: tuple[Array, Array], mask: CausalMask | Array, *others: Any
    ) -> LayerOutput:
        if isinstance(mask, CausalMask) and not self.is_sparse:
            mask = mask.without_blocks()
        return super().__call__(x, tables, mask, *others)


class Phi3SmallMLP(nnx.Module):
    """down(gegelu(up(x))); `up_proj` has the rows of gegelu's first operand, then those of its second one.

    In the checkpoint the two take turns.
    """

    def __init__(self, config: Phi3SmallConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None):
        embed, mlp = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        init: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "mesh": mesh, "bias": True}
        std = config.initializer_range
        bound = bias_bound(config.hidden_size)
        self.up_proj = Linear(embed, {"gate_up": 2, **mlp}, std=std, bias_bound=bound, **init)
        bound, std = bias_bound(config.intermediate_size), std * (2 * config.num_hidden_layers) ** -0.5
        self.down_proj = Linear(mlp, embed, std=std, bias_bound=bound, **init)
        self.limit = config.gegelu_limit

    def __call__(self, x: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        operands = self.up_proj(x, fold_in(key, 0)).astype(x.dtype)  # [B, T, 2, F]
        a, b = jax.lax.split(checkpoint_name(operands, "gate_up_proj"), (1, 1), axis=-2)
        return self.down_proj(gegelu(a, b, self.limit)[..., 0, :], fold_in(key, 1)).astype(x.dtype)


class Phi3SmallDecoderLayer(Phi3DecoderLayer):
    """Phi-3's layer of other parts; there is no dropout after attention."""

    def __init__(
        self, config: Phi3SmallConfig, *, is_sparse: bool, rngs: nnx.Rngs, dtype: jnp.dtype, mesh: Mesh | None
    ):
        init: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "mesh": mesh}
        norm: dict[str, Any] = {"eps": config.rms_norm_eps, "dtype": dtype, "mesh": mesh}
        self.self_attn = Phi3SmallSelfAttention(config, is_sparse=is_sparse, **init)
        self.mlp = Phi3SmallMLP(config, **init)
        self.input_layernorm = LayerNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, **norm)
        self.resid_attn_pdrop, self.resid_mlp_pdrop = 0.0, config.resid_pdrop
        self.mesh = mesh


class Phi3SmallModel(Phi3Model):
    """The Phi-3-small decoder without a head; see `Phi3Model`.

    The norm has the checkpoint's name, and Phi-3's as a property.
    """

    config: Phi3SmallConfig
    config_class: ClassVar[type[Phi3Config]] = Phi3SmallConfig

    def _make_layer(self, index: int, **init: Any) -> Phi3DecoderLayer:
        return Phi3SmallDecoderLayer(self.config, is_sparse=self.config.is_sparse(index), **init)

    def _add_norm(self, **init: Any) -> None:
        self.final_layernorm = LayerNorm(self.config.hidden_size, **init)

    @property
    def norm(self) -> LayerNorm:  # type: ignore[override]
        return self.final_layernorm


@dataclass(frozen=True)
class FinishLogits:
    """Divides logits, and replaces those of dummy tokens by the least float32."""

    divisor: float
    dummy_tokens: tuple[int, ...]

    def __call__(self, logits: Float[Array, "... V"], first: Any = 0) -> Float[Array, "... V"]:
        if self.divisor != 1:
            logits = logits / self.divisor
        if not self.dummy_tokens:
            return logits
        is_dummy = np.zeros(max(self.dummy_tokens) + 1, bool)
        is_dummy[list(self.dummy_tokens)] = True
        tokens = first + jnp.arange(logits.shape[-1], dtype=jnp.int32)
        hidden = jnp.asarray(is_dummy).at[tokens].get(mode="fill", fill_value=False)
        return jnp.where(jnp.expand_dims(hidden, range(logits.ndim - 1)), LEAST, logits)


class Phi3SmallForCausalLM(Phi3ForCausalLM):
    """Phi-3-small with a language-model head, whose logits are divided; see `Phi3ForCausalLM`."""

    config_class: ClassVar[type[Phi3Config]] = Phi3SmallConfig
    decoder_class: ClassVar[type[Phi3Model]] = Phi3SmallModel

    @property
    def _finish(self) -> FinishLogits:
        config = self.model.config
        assert isinstance(config, Phi3SmallConfig)
        width = config.mup_width_multiplier
        return FinishLogits(width or 1.0, config.dummy_token_ids)

    def cross_entropy_sum(
        self, hidden_states: Float[Array, "B T D"], labels: Int[Array, "B T"], label_smoothing: float = 0.0
    ) -> Float[Array, ""]:
        if label_smoothing and self._finish.dummy_tokens:
            raise UserError(
                f"label_smoothing={label_smoothing} would give probability to ids of no token, whose logits "
                "are the least float32; leave it at 0"
            )
        return super().cross_entropy_sum(hidden_states, labels, label_smoothing)

    def _check_labels(self, labels: Any, shape: tuple[int, int]) -> Array:
        labels = super()._check_labels(labels, shape)
        if is_concrete(labels):
            wrong = np.argwhere(np.isin(np.asarray(labels), self._finish.dummy_tokens))
            if wrong.size:
                row, position = wrong[0]
                raise UserError(
                    f"labels[{row}, {position}] = {labels[row, position]} is the id of no token, whose "
                    "logit is the least float32; use -100 for what does not count"
                )
        return labels


class Phi3SmallForSequenceClassification(Phi3ForSequenceClassification):
    """Phi-3-small with a score for each row; see `Phi3ForSequenceClassification`."""

    config_class: ClassVar[type[Phi3Config]] = Phi3SmallConfig
    decoder_class: ClassVar[type[Phi3Model]] = Phi3SmallModel


class Phi3SmallForTokenClassification(Phi3ForTokenClassification):
    """Phi-3-small with a score for each token; see `Phi3ForTokenClassification`."""

    config_class: ClassVar[type[Phi3Config]] = Phi3SmallConfig
    decoder_class: ClassVar[type[Phi3Model]] = Phi3SmallModel
