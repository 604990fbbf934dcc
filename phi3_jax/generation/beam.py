"""Beam search and beam sampling as in transformers 5: running beams next to the best finished ones."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.generation.forward import Records, next_logits, process
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sampling import Report, run_steps, score_records
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import State, StepSettings, append
from phi3_jax.sizes import INT32_MAX

IMPOSSIBLE = -1.0e9
"""The score of beams that do not exist, as in the reference."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """The running beams, each a row of `state`, and the best sequences of every prompt.

    "prompts" prompts have n beams each; W is the largest number of new tokens.
    """

    state: State
    running_scores: Float[Array, "prompts n"]
    """Sums of log-probabilities."""
    running_tokens: Int[Array, "prompts n W"]
    running_origins: Int[Array, "prompts n W"]
    """The beam that each token came from, counted over the batch; -1 where there is no token yet."""
    best_scores: Float[Array, "prompts n"]
    best_tokens: Int[Array, "prompts n W"]
    best_origins: Int[Array, "prompts n W"]
    best_is_finished: Bool[Array, "prompts n"]
    improvable: Bool[Array, "prompts 1"]
    """Whether running beams may still beat the finished ones."""
    over: Bool[Array, ""]

    @property
    def sequences(self) -> Sequences:
        return self.state.sequences

    @property
    def finished(self) -> Bool[Array, " B"]:
        return self.state.finished | self.over

    @property
    def cache(self) -> KVCache:
        return self.state.cache

    def with_cache(self, cache: KVCache) -> "BeamState":
        return replace(self, state=self.state.with_cache(cache))


class BeamRules(NamedTuple):
    """The compiled-in part of how beams are ranked."""

    early_stopping: bool | str
    end_tokens: int
    """The number of end tokens."""


class Candidates(NamedTuple):
    """The most likely continuations of a prompt's beams, best first (or in the order drawn)."""

    scores: Float[Array, "prompts k"]
    tokens: Int[Array, "prompts k"]
    beams: Int[Array, "prompts k"]


def start(state: State, beams: int, new_tokens: int, is_padding: Bool[Array, " prompts"]) -> BeamState:
    """Returns the search before its first token; each prompt's beams are equal, so only the first counts."""
    batch = is_padding.shape[0]
    none = jnp.full((batch, beams, new_tokens), -1, jnp.int32)
    impossible = jnp.full((batch, beams), IMPOSSIBLE, jnp.float32)
    return BeamState(
        state=state,
        running_scores=impossible.at[:, 0].set(0.0),
        running_tokens=jnp.zeros_like(none),
        running_origins=none,
        best_scores=impossible,
        best_tokens=jnp.zeros_like(none),
        best_origins=none,
        best_is_finished=jnp.zeros((batch, beams), bool) | is_padding[:, None],
        improvable=~is_padding[:, None],
        over=jnp.zeros((), bool),
    )


def propose(
    search: BeamState, scores: Float[Array, "R V"], settings: StepSettings, rules: BeamRules
) -> Candidates:
    """Returns the best continuations of all beams, enough for n to continue when the others end."""
    batch, beams = search.running_scores.shape
    vocabulary = scores.shape[-1]
    total = (scores.reshape(batch, beams, vocabulary) + search.running_scores[..., None]).reshape(batch, -1)
    count = max(2, 1 + rules.end_tokens) * beams
    ranked = total
    if settings.key is not None:  # the largest of these sums are a draw without replacement (Gumbel's trick)
        key = jax.random.fold_in(settings.key, search.sequences.new[0])
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch, dtype=jnp.int32))
        draws = jax.vmap(lambda row: jax.random.gumbel(row, total.shape[1:], jnp.float32))(keys)
        ranked = jax.nn.log_softmax(total, axis=-1) + draws
    _, index = jax.lax.top_k(ranked, count)
    return Candidates(
        jnp.take_along_axis(total, index, axis=1),
        (index % vocabulary).astype(jnp.int32),
        (index // vocabulary).astype(jnp.int32),
    )


def extend(
    search: BeamState, candidates: Candidates
) -> tuple[Int[Array, "prompts k W"], Int[Array, "prompts k W"]]:
    """Returns the candidates' new tokens and the beam that each came from."""
    beams = search.running_scores.shape[1]
    new = search.sequences.new[0]
    tokens = _gather(search.running_tokens, candidates.beams)
    origins = _gather(search.running_origins, candidates.beams)
    origin = candidates.beams + beams * jnp.arange(len(candidates.beams), dtype=jnp.int32)[:, None]
    return tokens.at[:, :, new].set(candidates.tokens), origins.at[:, :, new].set(origin)


def ends(search: BeamState, candidates: Candidates, settings: StepSettings) -> Bool[Array, "prompts k"]:
    """Returns which candidates end here, with an end token or at the limit."""
    last = search.sequences.new[0] + 1 >= settings.max_new_tokens
    return jnp.isin(candidates.tokens, settings.end_tokens) | last


def advance(
    search: BeamState,
    candidates: Candidates,
    ending: Bool[Array, "prompts k"],
    settings: StepSettings,
    length_penalty: Float[Array, ""],
    rules: BeamRules,
) -> BeamState:
    """Makes the best continuing candidates the running beams; ending ones compete with the finished ones."""
    batch, beams = search.running_scores.shape
    new = search.sequences.new[0]
    tokens, origins = extend(search, candidates)

    running = candidates.scores + _impossible_where(ending)
    running_scores, chosen = jax.lax.top_k(running, beams)
    parents = jnp.take_along_axis(candidates.beams, chosen, axis=1)
    rows = (parents + beams * jnp.arange(batch, dtype=jnp.int32)[:, None]).reshape(-1)
    if settings.guidance_scale is not None:
        rows = jnp.concatenate([rows, rows + batch * beams])
    next_tokens = jnp.take_along_axis(candidates.tokens, chosen, axis=1).reshape(-1, 1)
    unlimited = settings._replace(end_tokens=settings.end_tokens[:0], max_new_tokens=jnp.int32(INT32_MAX))
    state = append(search.state.take(rows), next_tokens, jnp.ones(batch * beams, jnp.int32), unlimited)

    # Only the first n candidates may finish; the others exist so that n can continue.
    finishing = ending & (jnp.arange(ending.shape[1], dtype=jnp.int32)[None] < beams)
    scores = candidates.scores / (new + 1).astype(jnp.float32) ** length_penalty
    if rules.early_stopping is True:
        scores += _impossible_where(jnp.all(search.best_is_finished, axis=1, keepdims=True))
    scores += _impossible_where(~search.improvable)
    scores += _impossible_where(~finishing)
    best_scores, best = jax.lax.top_k(jnp.concatenate([search.best_scores, scores], axis=1), beams)

    def merge(old: Array, added: Array) -> Array:
        return _gather(jnp.concatenate([old, added], axis=1), best)

    search = replace(
        search,
        state=state,
        running_scores=running_scores,
        running_tokens=_gather(tokens, chosen),
        running_origins=_gather(origins, chosen),
        best_scores=best_scores,
        best_tokens=merge(search.best_tokens, tokens),
        best_origins=merge(search.best_origins, origins),
        best_is_finished=merge(search.best_is_finished, finishing),
    )
    return _update_end(search, ending, settings, length_penalty, rules)


def _update_end(
    search: BeamState,
    ending: Bool[Array, "prompts k"],
    settings: StepSettings,
    length_penalty: Float[Array, ""],
    rules: BeamRules,
) -> BeamState:
    """Updates whether more tokens can change anything, by the reference's estimates."""
    length = search.sequences.new[0]
    if rules.early_stopping == "never":  # if length is rewarded, the longest sequence has the best chance
        length = jnp.where(length_penalty > 0, settings.max_new_tokens, length)
    possible = search.running_scores[:, :1] / length.astype(jnp.float32) ** length_penalty
    worst = jnp.min(search.best_scores, axis=1, keepdims=True)
    worst = jnp.where(search.best_is_finished, worst, IMPOSSIBLE)
    improvable = search.improvable & jnp.any(possible > worst, axis=1, keepdims=True)
    full = rules.early_stopping is True and jnp.all(search.best_is_finished)
    batch, beams = search.running_scores.shape
    is_padding = search.state.finished[: batch * beams].reshape(batch, beams)[:, :1]
    all_end = jnp.all(ending | is_padding)
    return replace(search, improvable=improvable, over=~jnp.any(improvable) | full | all_end)


def step(
    search: BeamState,
    logits: Float[Array, "B V"],
    settings: StepSettings,
    length_penalty: Float[Array, ""],
    rules: BeamRules,
) -> tuple[BeamState, Float[Array, "R V"]]:
    """Turns logits into the next running beams, without the host."""
    scores = beam_scores(logits, search.sequences, settings)
    candidates = propose(search, scores, settings, rules)
    ending = ends(search, candidates, settings)
    return advance(search, candidates, ending, settings, length_penalty, rules), scores


def beam_scores(
    logits: Float[Array, "B V"], sequences: Sequences, settings: StepSettings
) -> Float[Array, "R V"]:
    """Returns log-probabilities after all logits processors."""
    scores = process(logits, sequences, settings, normalize=True)
    return settings.after_host(sequences.first(scores.shape[0]), scores)


def loop(
    model: CausalLM,
    search: BeamState,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    length_penalty: Float[Array, ""],
    *,
    most: int,
    rules: BeamRules,
    outputs: frozenset[str],
) -> tuple[BeamState, Report]:
    """Generates up to `steps` <= `most` tokens for every beam without the host."""

    def one_step(search: BeamState) -> tuple[BeamState, Int[Array, "R 1"], Records]:
        logits, state, records = next_logits(
            model, search.state, settings.rope, width=1, aligned=True, outputs=outputs
        )
        search, scores = step(replace(search, state=state), logits, settings, length_penalty, rules)
        tokens = search.running_tokens[:, :, search.sequences.new[0] - 1].reshape(-1, 1)
        return search, tokens, records | score_records(logits, scores, outputs)

    return run_steps(one_step, model.config, search, settings, steps, most)


def _impossible_where(never: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Returns what makes the scores of such candidates impossible when it is added."""
    return jnp.where(never, jnp.float32(IMPOSSIBLE), jnp.float32(0))


def _gather(x: Any, beams: Int[Array, "prompts k"]) -> Any:
    """Returns each prompt's `beams` of `x` in this order."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *[1] * (x.ndim - 2)), axis=1)
