"""Beam search and beam sampling, as transformers 5 does it: running beams beside the best finished ones."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.generation.forward import Records, next_logits, process
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sampling import Report, run_steps
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import State, StepSettings, append

IMPOSSIBLE = -1.0e9
"""The score of beams that are not there, as in the reference."""
ENDLESS = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """Running beams, each a lane of `lanes`, and for every row of the batch the best sequences so far.

    B rows of n beams; W new tokens at most.
    """

    lanes: State
    running_scores: Float[Array, "B n"]
    """Sums of log-probabilities."""
    running_tokens: Int[Array, "B n W"]
    running_origins: Int[Array, "B n W"]
    """The beam that each token came from, counted over the batch; -1 where there is no token yet."""
    best_scores: Float[Array, "B n"]
    best_tokens: Int[Array, "B n W"]
    best_origins: Int[Array, "B n W"]
    best_is_finished: Bool[Array, "B n"]
    improvable: Bool[Array, "B 1"]
    """Whether running beams may still beat the finished ones."""
    over: Bool[Array, ""]

    @property
    def sequences(self) -> Sequences:
        return self.lanes.sequences

    @property
    def finished(self) -> Bool[Array, " L"]:
        return self.lanes.finished | self.over

    @property
    def cache(self) -> KVCache:
        return self.lanes.cache

    def with_cache(self, cache: KVCache) -> "BeamState":
        return replace(self, lanes=self.lanes.with_cache(cache))


class Rules(NamedTuple):
    """How beams are ranked; compiled in, but for the penalty."""

    early_stopping: bool | str
    ends: int
    """How many end tokens there are."""


class Candidates(NamedTuple):
    """The likeliest continuations of a row's beams, best first (or in the order drawn)."""

    scores: Float[Array, "B k"]
    tokens: Int[Array, "B k"]
    beams: Int[Array, "B k"]


def start(lanes: State, beams: int, new_tokens: int, dummies: Bool[Array, " B"]) -> BeamState:
    """The search before its first token; only the first beam of each row counts, as all are the same."""
    batch = dummies.shape[0]
    none = jnp.full((batch, beams, new_tokens), -1, jnp.int32)
    impossible = jnp.full((batch, beams), IMPOSSIBLE, jnp.float32)
    return BeamState(
        lanes=lanes,
        running_scores=impossible.at[:, 0].set(0.0),
        running_tokens=jnp.zeros_like(none),
        running_origins=none,
        best_scores=impossible,
        best_tokens=jnp.zeros_like(none),
        best_origins=none,
        best_is_finished=jnp.zeros((batch, beams), bool) | dummies[:, None],
        improvable=~dummies[:, None],
        over=jnp.zeros((), bool),
    )


def propose(
    search: BeamState, scores: Float[Array, "R V"], settings: StepSettings, rules: Rules
) -> Candidates:
    """The candidates among all continuations, enough for n to remain when the others end."""
    batch, beams = search.running_scores.shape
    vocabulary = scores.shape[-1]
    total = (scores.reshape(batch, beams, vocabulary) + search.running_scores[..., None]).reshape(batch, -1)
    count = max(2, 1 + rules.ends) * beams
    ranked = total
    if settings.key is not None:  # the largest of these sums are a draw without replacement (Gumbel's trick)
        key = jax.random.fold_in(settings.key, search.sequences.new[0])
        draw = jax.vmap(lambda row: jax.random.gumbel(jax.random.fold_in(key, row), total.shape[1:]))
        ranked = jax.nn.log_softmax(total, axis=-1) + draw(jnp.arange(batch))
    _, index = jax.lax.top_k(ranked, count)
    return Candidates(
        jnp.take_along_axis(total, index, axis=1),
        (index % vocabulary).astype(jnp.int32),
        (index // vocabulary).astype(jnp.int32),
    )


def extended(search: BeamState, candidates: Candidates) -> tuple[Int[Array, "B k W"], Int[Array, "B k W"]]:
    """The candidates' new tokens and where each came from."""
    beams = search.running_scores.shape[1]
    new = search.sequences.new[0]
    tokens = _gather(search.running_tokens, candidates.beams)
    origins = _gather(search.running_origins, candidates.beams)
    origin = candidates.beams + beams * jnp.arange(len(candidates.beams), dtype=jnp.int32)[:, None]
    return tokens.at[:, :, new].set(candidates.tokens), origins.at[:, :, new].set(origin)


def ends(search: BeamState, candidates: Candidates, settings: StepSettings) -> Bool[Array, "B k"]:
    """Candidates that end here, with an end token or by their length."""
    last = search.sequences.new[0] + 1 >= settings.max_new_tokens
    return jnp.isin(candidates.tokens, settings.end_tokens) | last


def advance(
    search: BeamState,
    candidates: Candidates,
    ending: Bool[Array, "B k"],
    settings: StepSettings,
    length_penalty: Float[Array, ""],
    rules: Rules,
) -> BeamState:
    """The best that go on become the running beams, those that end compete with the finished ones."""
    batch, beams = search.running_scores.shape
    new = search.sequences.new[0]
    tokens, origins = extended(search, candidates)

    running = candidates.scores + ending * IMPOSSIBLE
    running_scores, chosen = jax.lax.top_k(running, beams)
    parents = jnp.take_along_axis(candidates.beams, chosen, axis=1)
    lanes = (parents + beams * jnp.arange(batch, dtype=jnp.int32)[:, None]).reshape(-1)
    if settings.guidance_scale is not None:
        lanes = jnp.concatenate([lanes, lanes + batch * beams])
    following = jnp.take_along_axis(candidates.tokens, chosen, axis=1).reshape(-1, 1)
    endless = settings._replace(end_tokens=settings.end_tokens[:0], max_new_tokens=jnp.int32(ENDLESS))
    moved = append(search.lanes.take(lanes), following, jnp.ones(batch * beams, jnp.int32), endless)

    # Only the first n candidates may finish; the others are there so that n can go on.
    finishing = ending & (jnp.arange(ending.shape[1]) < beams)
    scores = candidates.scores / (new + 1).astype(jnp.float32) ** length_penalty
    if rules.early_stopping is True:
        scores += jnp.all(search.best_is_finished, axis=1, keepdims=True) * IMPOSSIBLE
    scores += ~search.improvable * IMPOSSIBLE
    scores += ~finishing * IMPOSSIBLE
    best_scores, best = jax.lax.top_k(jnp.concatenate([search.best_scores, scores], axis=1), beams)

    def merged(kept: Array, added: Array) -> Array:
        return _gather(jnp.concatenate([kept, added], axis=1), best)

    search = replace(
        search,
        lanes=moved,
        running_scores=running_scores,
        running_tokens=_gather(tokens, chosen),
        running_origins=_gather(origins, chosen),
        best_scores=best_scores,
        best_tokens=merged(search.best_tokens, tokens),
        best_origins=merged(search.best_origins, origins),
        best_is_finished=merged(search.best_is_finished, finishing),
    )
    return _judge(search, ending, settings, length_penalty, rules)


def _judge(
    search: BeamState,
    ending: Bool[Array, "B k"],
    settings: StepSettings,
    length_penalty: Float[Array, ""],
    rules: Rules,
) -> BeamState:
    """Whether going on can change anything, by the reference's estimates."""
    length = search.sequences.new[0]
    if rules.early_stopping == "never":  # the longest sequence has the best chance if length is rewarded
        length = jnp.where(length_penalty > 0, settings.max_new_tokens, length)
    possible = search.running_scores[:, :1] / length.astype(jnp.float32) ** length_penalty
    worst = jnp.min(search.best_scores, axis=1, keepdims=True)
    worst = jnp.where(search.best_is_finished, worst, IMPOSSIBLE)
    improvable = search.improvable & jnp.any(possible > worst, axis=1, keepdims=True)
    full = rules.early_stopping is True and jnp.all(search.best_is_finished)
    batch, beams = search.running_scores.shape
    dummies = search.lanes.finished[: batch * beams].reshape(batch, beams)[:, :1]
    nowhere = jnp.all(ending | dummies)
    return replace(search, improvable=improvable, over=~jnp.any(improvable) | full | nowhere)


def step(
    search: BeamState,
    logits: Float[Array, "L V"],
    settings: StepSettings,
    length_penalty: Float[Array, ""],
    rules: Rules,
) -> tuple[BeamState, Float[Array, "R V"]]:
    """From logits to the next running beams, without the host."""
    scores = beam_scores(logits, search.sequences, settings)
    candidates = propose(search, scores, settings, rules)
    ending = ends(search, candidates, settings)
    return advance(search, candidates, ending, settings, length_penalty, rules), scores


def beam_scores(
    logits: Float[Array, "L V"], sequences: Sequences, settings: StepSettings
) -> Float[Array, "R V"]:
    """Log-probabilities after all logits processors."""
    scores = process(logits, sequences, settings, normalize=True)
    rows = jax.tree.map(lambda x: x[: scores.shape[0]], sequences)
    return settings.after_host(rows, scores)


def loop(
    model: CausalLM,
    search: BeamState,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    length_penalty: Float[Array, ""],
    *,
    most: int,
    rules: Rules,
    outputs: frozenset[str],
) -> tuple[BeamState, Report]:
    """Up to `steps` <= `most` tokens for every beam, without the host."""

    def one(search: BeamState) -> tuple[BeamState, Int[Array, "R 1"], Records]:
        logits, lanes, records = next_logits(
            model, search.lanes, settings.rope, width=1, aligned=True, outputs=outputs
        )
        search, scores = step(replace(search, lanes=lanes), logits, settings, length_penalty, rules)
        own = {"logits": logits[: len(scores), None], "scores": scores[:, None]}
        tokens = search.running_tokens[:, :, search.sequences.new[0] - 1].reshape(-1, 1)
        return search, tokens, records | {name: own[name] for name in sorted(outputs & own.keys())}

    return run_steps(one, model.config, search, settings, steps, most)


def _gather(x: Any, beams: Int[Array, "B k"]) -> Any:
    """Each row's `beams`, in that order."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *[1] * (x.ndim - 2)), axis=1)
