"""From a state to the scores of its next tokens: the model, guidance, the logits processors."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import RopeChoice, State, StepSettings

Records = dict[str, Any]
"""What a step keeps for the user: scores, logits, attentions, hidden_states; each only if asked for."""


def feed(
    model: CausalLM,
    state: State,
    rope: RopeChoice,
    count: Int[Array, " L"],
    width: int,
    **arguments: Any,
) -> tuple[Any, State]:
    """Runs the next `count` <= `width` columns of each lane through the model and into its cache."""
    columns = state.cache.length[:, None] + jnp.arange(width)  # [L, width]
    ids = jnp.take_along_axis(state.sequences.ids, columns, axis=1, mode="clip")
    mask = jnp.take_along_axis(state.sequences.mask, columns, axis=1, mode="clip")
    fed = mask & (jnp.arange(width) < count[:, None])
    positions = jnp.maximum(state.cache.tokens[:, None] + jnp.cumsum(fed, axis=1) - 1, 0)
    out = model(
        ids,
        fed,
        past_key_values=state.cache,
        rope_length=rope.length(state.sequences.tokens),
        **rope.given(positions),
        **arguments,
    )
    assert out.past_key_values is not None
    cache = out.past_key_values.rewind(state.cache.length + count)
    return out, State(state.sequences, state.finished, cache)


def fill(
    model: CausalLM, state: State, rope: RopeChoice, *, width: int, outputs: frozenset[str]
) -> tuple[State, Records]:
    """Feeds up to `width` columns of each lane, all but its last: no logits."""
    count = jnp.clip(state.pending - 1, 0, width)
    wanted = {f"output_{name}": True for name in outputs & {"attentions", "hidden_states"}}
    out, state = feed(model, state, rope, count, width, logits_to_keep=1, **wanted)
    return state, kept(out, outputs)


def next_logits(
    model: CausalLM,
    state: State,
    rope: RopeChoice,
    *,
    width: int,
    aligned: bool,
    outputs: frozenset[str],
) -> tuple[Float[Array, "L V"], State, Records]:
    """Feeds all that each lane lacks, at most `width` columns, and gives the logits behind the last one.

    `aligned` says that no lane lacks fewer than `width` columns, so that the last stand side by side.
    """
    count = state.pending
    keep = 1 if aligned else jnp.maximum(count - 1, 0)[:, None]
    wanted = {f"output_{name}": True for name in outputs & {"attentions", "hidden_states"}}
    out, state = feed(model, state, rope, count, width, logits_to_keep=keep, **wanted)
    return out.logits[:, 0], state, kept(out, outputs)


def kept(out: Any, outputs: frozenset[str]) -> Records:
    """The model's own outputs that were asked for."""
    return {name: getattr(out, name) for name in sorted(outputs & {"attentions", "hidden_states"})}


def process(
    logits: Float[Array, "L V"], sequences: Sequences, settings: StepSettings, *, normalize: bool = False
) -> Float[Array, "R V"]:
    """Guidance and the first logits processors; on log-probabilities if `normalize`, as for beams."""
    scores = jax.nn.log_softmax(logits, axis=-1) if normalize else logits
    if settings.guidance_scale is not None:
        conditional, unconditional = jnp.split(jax.nn.log_softmax(logits, axis=-1), 2)
        scores = settings.guidance_scale * (conditional - unconditional) + unconditional
    rows = scores.shape[0]
    return settings.before_host(jax.tree.map(lambda x: x[:rows], sequences), scores)


def needs_recomputation(config: Phi3Config, state: State, rope: RopeChoice) -> Bool[Array, " L"]:
    """Lanes whose cache was computed under another rope list than their next column asks for."""
    return ~state.finished & frequencies_change(config, rope, state.cache.rope_length, state.sequences.tokens)


def frequencies_change(
    config: Phi3Config, rope: RopeChoice, computed: Int[Array, " L"], tokens: Int[Array, " L"]
) -> Bool[Array, " L"]:
    """Lanes that ask for another rope list with so many tokens than for the length that was computed with."""
    if rope.inv_freq is not None:
        return jnp.zeros(tokens.shape, bool)
    return config.rope_scaling.needs_recomputation(config.rope_base, computed, rope.length(tokens))
