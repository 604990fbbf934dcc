"""One step from a state to the scores of the next tokens: model, guidance and logits processors."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.prompts import SlotEmbeddings
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, State, StepSettings

Records = dict[str, Any]
"""The outputs of a step that the user wants: scores, logits, attentions, hidden_states."""


def feed(
    model: CausalLM,
    state: State,
    rope: RopeChoice,
    count: Int[Array, " B"],
    width: int,
    embeddings: SlotEmbeddings | None = None,
    **arguments: Any,
) -> tuple[Any, State]:
    """Runs the next `count` <= `width` slots of each row through the model and into its cache.

    `embeddings` stand in the place of the ids of some slots.
    """
    offsets = jnp.arange(width, dtype=jnp.int32)[None]
    slots = state.cache.length[:, None] + offsets  # [B, width]
    ids = jnp.take_along_axis(state.sequences.ids, slots, axis=1, mode="clip")
    mask = jnp.take_along_axis(state.sequences.mask, slots, axis=1, mode="clip")
    mask &= offsets < count[:, None]
    counts = state.cache.tokens[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(counts - 1, 0)
    if embeddings is not None:
        arguments |= {"inputs_embeds": _embedded(model, embeddings, ids, slots)}
    out = model(
        ids if embeddings is None else None,
        mask,
        past_key_values=state.cache,
        rope_length=rope.length(state.sequences.tokens),
        **rope.model_arguments(positions),
        **arguments,
    )
    assert out.past_key_values is not None
    cache = out.past_key_values.rewind(state.cache.length + count)
    return out, State(state.sequences, state.finished, cache)


def _embedded(
    model: CausalLM, embeddings: SlotEmbeddings, ids: Int[Array, "B T"], slots: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Returns the embeddings of `slots`: those given, and elsewhere those of `ids`."""
    own = model.decoder.embed_tokens(ids)
    given, is_given = (jnp.asarray(x) for x in embeddings)
    given = jnp.take_along_axis(given, slots[..., None], axis=1, mode="clip").astype(own.dtype)
    is_given = jnp.take_along_axis(is_given, slots, axis=1, mode="fill", fill_value=False)
    return jnp.where(is_given[..., None], given, own)


def fill(
    model: CausalLM,
    state: State,
    rope: RopeChoice,
    embeddings: SlotEmbeddings | None = None,
    *,
    width: int,
    outputs: frozenset[str],
) -> tuple[State, Records]:
    """Feeds up to `width` slots of each row, never its last one; computes no logits."""
    count = jnp.clip(state.pending - 1, 0, width)
    flags = output_flags(outputs)
    out, state = feed(model, state, rope, count, width, embeddings, logits_to_keep=1, **flags)
    return state, select_outputs(out, outputs)


def next_logits(
    model: CausalLM,
    state: State,
    rope: RopeChoice,
    embeddings: SlotEmbeddings | None = None,
    *,
    width: int,
    aligned: bool,
    outputs: frozenset[str],
) -> tuple[Float[Array, "B V"], State, Records]:
    """Feeds all pending slots of each row, at most `width`, and returns the logits after the last one.

    `aligned` promises that every row has at least `width` pending slots, so that all end at the same index.
    """
    count = state.pending
    keep = 1 if aligned else jnp.maximum(count - 1, 0)[:, None]
    flags = output_flags(outputs)
    out, state = feed(model, state, rope, count, width, embeddings, logits_to_keep=keep, **flags)
    return out.logits[:, 0], state, select_outputs(out, outputs)


def output_flags(outputs: frozenset[str]) -> dict[str, bool]:
    """Returns the arguments that make the model return its own `outputs`."""
    return {f"output_{name}": True for name in outputs & {"attentions", "hidden_states"}}


def select_outputs(out: Any, outputs: frozenset[str]) -> Records:
    """Returns those of `outputs` that the model itself computes."""
    return {name: getattr(out, name) for name in sorted(outputs & {"attentions", "hidden_states"})}


def process(
    logits: Float[Array, "B V"], sequences: Sequences, settings: StepSettings, *, normalize: bool = False
) -> Float[Array, "R V"]:
    """Applies guidance and the first logits processors; to log-probabilities if `normalize`, as for beams."""
    scores = jax.nn.log_softmax(logits, axis=-1) if normalize else logits
    if settings.guidance_scale is not None:
        conditional, unconditional = jnp.split(jax.nn.log_softmax(logits, axis=-1), 2)
        scores = settings.guidance_scale * (conditional - unconditional) + unconditional
    return settings.before_host(sequences.first(scores.shape[0]), scores)


def needs_recomputation(config: Phi3Config, state: State, rope: RopeChoice) -> Bool[Array, " B"]:
    """Returns which rows have a cache whose rope frequencies do not fit their next token."""
    return ~state.finished & frequencies_change(config, rope, state.cache.rope_length, state.sequences.tokens)


def frequencies_change(
    config: Phi3Config, rope: RopeChoice, computed: Int[Array, " B"], tokens: Int[Array, " B"]
) -> Bool[Array, " B"]:
    """Returns which rows have other rope frequencies at `tokens` tokens than at the length `computed`."""
    if rope.inv_freq is not None:
        return jnp.zeros(tokens.shape, bool)
    return config.rope_scaling.needs_recomputation(config.rope_base, computed, rope.length(tokens))
