"""Greedy search and sampling: the choice of a token, and the loop on the device around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.forward import Records, needs_recomputation, next_logits, process
from phi3_jax.generation.largest import argmax
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.state import NO_TOKEN, State, StepSettings, append


class Report(NamedTuple):
    """The result of one dispatch, for the host."""

    tokens: Int[Array, "steps R n"]
    """The tokens of each step, NO_TOKEN where there is none; n is 1 without drafts."""
    steps: Int[Array, ""]
    finished: Bool[Array, " R"]
    needs_recomputation: Bool[Array, " B"]
    """Rows whose cache must be computed again, under other rope frequencies, before their next token."""
    records: Records
    """The records of all steps, stacked."""


def choose(
    scores: Float[Array, "R V"], new: Int[Array, " R"], key: Key[Array, "..."] | None
) -> Int[Array, " R"]:
    """Returns the most likely token of each row or, with a key, one drawn from the distribution.

    A draw depends on the key, the row and its number of generated tokens, not on the rest of the batch.
    """
    if key is None:
        return argmax(scores)
    keys = row_keys(key, new)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def row_keys(key: Key[Array, "..."], new: Int[Array, " R"]) -> Key[Array, " R"]:
    """Returns a key for each row's next token, from one for all or one for each."""
    if key.ndim:
        return jax.vmap(jax.random.fold_in)(key, new)
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)
    return jax.vmap(lambda row, count: jax.random.fold_in(jax.random.fold_in(key, row), count))(rows, new)


def select(
    scores: Float[Array, "R V"], state: State, settings: StepSettings
) -> tuple[State, Int[Array, " R"], Float[Array, "R V"]]:
    """Applies the last logits processors, chooses a token for each row and appends it."""
    rows = scores.shape[0]
    sequences = state.sequences.first(rows)
    scores = settings.after_host(sequences, scores)
    tokens = choose(scores, sequences.new, settings.key)
    report = jnp.where(state.finished[:rows], NO_TOKEN, tokens)
    return append(state, tokens[:, None], jnp.ones_like(tokens), settings), report, scores


def loop(
    model: CausalLM,
    state: State,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    *,
    most: int,
    outputs: frozenset[str],
) -> tuple[State, Report]:
    """Generates up to `steps` <= `most` tokens for each row without the host.

    Returns early when every row has ended, a row needs recomputation, or the slots are full.
    """

    def step(state: State) -> tuple[State, Int[Array, "R 1"], Records]:
        logits, state, records = next_logits(
            model, state, settings.rope, width=1, aligned=True, outputs=outputs
        )
        scores = process(logits, state.sequences, settings)
        state, tokens, scores = select(scores, state, settings)
        return state, tokens[:, None], records | score_records(logits, scores, outputs)

    return run_steps(step, model.config, state, settings, steps, most)


def score_records(
    logits: Float[Array, "B V"], scores: Float[Array, "R V"], outputs: frozenset[str]
) -> Records:
    """Returns a step's logits and scores [R, 1, V], as far as `outputs` names them."""
    own = {"logits": logits[: scores.shape[0], None], "scores": scores[:, None]}
    return {name: own[name] for name in sorted(outputs & own.keys())}


def run_steps(
    step: Callable[[Any], tuple[Any, Int[Array, "R n"], Records]],
    config: Phi3Config,
    state: Any,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    most: int,
    outdated: Callable[[Any], Bool[Array, " B"]] | None = None,
) -> tuple[Any, Report]:
    """Repeats `step` in a `while_loop` and stacks its results in a report.

    `outdated` returns the rows that need recomputation; default: those of the model.
    """
    outdated = outdated or (lambda state: needs_recomputation(config, state, settings.rope))
    slots = state.sequences.ids.shape[1]
    _, tokens_of_step, records_of_step = jax.eval_shape(step, state)
    rows, width = tokens_of_step.shape
    stacked = (
        jnp.full((most, rows, width), NO_TOKEN, jnp.int32),
        jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), records_of_step),
    )

    def continues(carry: Any) -> Bool[Array, ""]:
        done, state, recompute, _ = carry
        # A step writes past the end of finished rows too, so they count as well.
        room = jnp.max(state.sequences.length) + width <= slots
        return (done < steps) & room & ~jnp.all(state.finished) & ~jnp.any(recompute)

    def body(carry: Any) -> Any:
        done, state, _, stacked = carry
        state, tokens, records = step(state)

        def put(all_steps: Array, one: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(all_steps, one, done, 0)

        stacked = jax.tree.map(put, stacked, (tokens, records))
        return done + 1, state, outdated(state), stacked

    carry = (jnp.int32(0), state, outdated(state), stacked)
    done, state, recompute, (tokens, records) = jax.lax.while_loop(continues, body, carry)
    return state, Report(tokens, done, state.finished[:rows], recompute, records)
