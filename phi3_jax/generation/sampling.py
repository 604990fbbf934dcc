"""Greedy search and sampling: choosing a token, and the loop on the device around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.forward import Records, needs_recomputation, next_logits, process
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.state import NO_TOKEN, State, StepSettings, append


class Report(NamedTuple):
    """What a dispatch tells the host."""

    tokens: Int[Array, "steps R n"]
    """Tokens made in each step, NO_TOKEN where there is none; n is 1 without an assistant."""
    steps: Int[Array, ""]
    finished: Bool[Array, " R"]
    needs_recomputation: Bool[Array, " L"]
    """Lanes to be computed again under the other rope list before they go on."""
    records: Records
    """Of each step, stacked."""


def choose(
    scores: Float[Array, "R V"], new: Int[Array, " R"], key: Key[Array, "..."] | None
) -> Int[Array, " R"]:
    """The most likely token of each row or, with a key, one drawn from the distribution.

    A draw depends on the key, the row and how many tokens the row has made: not on the batch around it.
    """
    if key is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    keys = row_keys(key, new)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def row_keys(key: Key[Array, "..."], new: Int[Array, " R"]) -> Key[Array, " R"]:
    """A key for each row's next token, from one for all or one for each."""
    if key.ndim:
        return jax.vmap(jax.random.fold_in)(key, new)
    rows = jnp.arange(new.shape[0])
    return jax.vmap(lambda row, made: jax.random.fold_in(jax.random.fold_in(key, row), made))(rows, new)


def select(
    scores: Float[Array, "R V"], state: State, settings: StepSettings
) -> tuple[State, Int[Array, " R"], Float[Array, "R V"]]:
    """The last logits processors, a token for each row, and the state with it."""
    rows = scores.shape[0]
    sequences = jax.tree.map(lambda x: x[:rows], state.sequences)
    scores = settings.after_host(sequences, scores)
    tokens = choose(scores, sequences.new, settings.key)
    made = jnp.where(state.finished[:rows], NO_TOKEN, tokens)
    return append(state, tokens[:, None], jnp.ones_like(tokens), settings), made, scores


def loop(
    model: CausalLM,
    state: State,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    *,
    most: int,
    outputs: frozenset[str],
) -> tuple[State, Report]:
    """Up to `steps` <= `most` tokens for each row, without the host.

    Ends early when every row has ended, a row must be computed again under another rope list, or the columns
    are full.
    """

    def step(state: State) -> tuple[State, Int[Array, "R 1"], Records]:
        logits, state, records = next_logits(
            model, state, settings.rope, width=1, aligned=True, outputs=outputs
        )
        scores = process(logits, state.sequences, settings)
        state, tokens, scores = select(scores, state, settings)
        own = {"logits": logits[: scores.shape[0], None], "scores": scores[:, None]}
        return state, tokens[:, None], records | {name: own[name] for name in sorted(outputs & own.keys())}

    return run_steps(step, model.config, state, settings, steps, most)


def run_steps(
    step: Callable[[Any], tuple[Any, Int[Array, "R n"], Records]],
    config: Phi3Config,
    state: Any,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    most: int,
    stale: Callable[[Any], Bool[Array, " L"]] | None = None,
) -> tuple[Any, Report]:
    """`step` again and again in a `while_loop`, what it gives stacked in a report.

    `stale` tells which lanes must be computed again under another rope list; default: those of the model.
    """
    stale = stale or (lambda state: needs_recomputation(config, state, settings.rope))
    columns = state.sequences.ids.shape[1]
    _, tokens_of_step, records_of_step = jax.eval_shape(step, state)
    rows, width = tokens_of_step.shape
    stacked = (
        jnp.full((most, rows, width), NO_TOKEN, jnp.int32),
        jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), records_of_step),
    )

    def go_on(carry: Any) -> Bool[Array, ""]:
        done, state, refill, _ = carry
        # A lane that has ended is written behind its end too, so it counts as well.
        room = jnp.max(state.sequences.length) + width <= columns
        return (done < steps) & room & ~jnp.all(state.finished) & ~jnp.any(refill)

    def body(carry: Any) -> Any:
        done, state, _, stacked = carry
        state, tokens, records = step(state)

        def put(all_steps: Array, one: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(all_steps, one, done, 0)

        stacked = jax.tree.map(put, stacked, (tokens, records))
        return done + 1, state, stale(state), stacked

    carry = (jnp.int32(0), state, stale(state), stacked)
    done, state, refill, (tokens, records) = jax.lax.while_loop(go_on, body, carry)
    return state, Report(tokens, done, state.finished[:rows], refill, records)
