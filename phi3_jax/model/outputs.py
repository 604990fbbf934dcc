"""The outputs of a forward: the reference's classes as pytrees."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from phi3_jax.cache.cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseModelOutputWithPast:
    """The output of `Phi3Model`."""

    last_hidden_state: Float[Array, "B T D"]
    past_key_values: KVCache | None = None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None
    """The embeddings, then each layer's output; the last has passed the final norm."""
    attentions: tuple[Float[Array, "B N T S"], ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalLMOutputWithPast:
    """The output of `Phi3ForCausalLM`."""

    logits: Float[Array, "B T V"]
    loss: Float[Array, ""] | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None
    attentions: tuple[Float[Array, "B N T S"], ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceClassifierOutputWithPast:
    """The output of `Phi3ForSequenceClassification`."""

    logits: Float[Array, "B labels"]
    loss: Float[Array, ""] | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None
    attentions: tuple[Float[Array, "B N T S"], ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenClassifierOutput:
    """The output of `Phi3ForTokenClassification`."""

    logits: Float[Array, "B T labels"]
    loss: Float[Array, ""] | None = None
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None
    attentions: tuple[Float[Array, "B N T S"], ...] | None = None
