"""Assisted generation: several tokens drafted, then checked in one forward; the result is as without.

Drafts come from an assistant model, or from earlier in the text (prompt lookup). Sampling with an assistant
is Algorithm 1 of Leviathan et al. (2023), https://arxiv.org/abs/2211.17192.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.generation.forward import (
    Records,
    feed,
    frequencies_change,
    kept,
    needs_recomputation,
    next_logits,
    process,
)
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sampling import Report, choose, row_keys, run_steps
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import NO_TOKEN, State, StepSettings, append

ENDLESS = jnp.iinfo(jnp.int32).max
DRAFT_DRAWS, ACCEPT_DRAWS = 1 << 30, (1 << 30) + 1
"""Folded into the key for draws other than the model's own."""


class Draft(NamedTuple):
    """Proposed tokens: the first `length` of each row."""

    tokens: Int[Array, "R k"]
    length: Int[Array, " R"]
    scores: Float[Array, "R k V"] | None
    """The logits they were drawn from; None if they were not drawn."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AssistedState:
    """The model's state and the assistant's cache of the same sequences."""

    lanes: State
    assistant: KVCache

    @property
    def sequences(self) -> Sequences:
        return self.lanes.sequences

    @property
    def finished(self) -> Bool[Array, " L"]:
        return self.lanes.finished

    @property
    def cache(self) -> KVCache:
        return self.lanes.cache

    def with_cache(self, cache: KVCache) -> "AssistedState":
        return replace(self, lanes=self.lanes.with_cache(cache))

    def widen(self, columns: int) -> "AssistedState":
        assistant = self.assistant if self.assistant.window is not None else self.assistant.resize(columns)
        return AssistedState(self.lanes.widen(columns), assistant)

    def truncate(self, new: Int[Array, " L"], finished: Bool[Array, " L"]) -> "AssistedState":
        lanes = self.lanes.truncate(new, finished)
        return AssistedState(
            lanes, self.assistant.rewind(jnp.minimum(self.assistant.length, lanes.cache.length))
        )


def lookup(sequences: Sequences, tokens: int, max_ngram: int, end_tokens: Int[Array, " E"]) -> Draft:
    """What followed the latest n-gram where it first stood in the text; longer n-grams first.

    Up to an end token, which is not drafted: what comes after it must not be accepted.
    """
    columns = sequences.ids.shape[1]
    column = jnp.arange(columns)
    start = jnp.full(sequences.length.shape, columns, jnp.int32)  # where the draft begins; none yet
    for size in range(max_ngram, 0, -1):
        latest, real = sequences.last(size)
        same = jnp.ones(sequences.ids.shape, bool)
        for offset in range(size):
            shifted = jnp.roll(sequences.ids, -offset, axis=1) == latest[:, offset, None]
            same &= shifted & jnp.roll(sequences.mask, -offset, axis=1)
        same &= (column + size < sequences.length[:, None]) & jnp.all(real, axis=1)[:, None]
        first = jnp.argmax(same, axis=1) + size
        start = jnp.where((start == columns) & jnp.any(same, axis=1), first, start)
    places = start[:, None] + jnp.arange(tokens)
    draft = jnp.take_along_axis(sequences.ids, places, axis=1, mode="clip")
    usable = (places < sequences.length[:, None]) & ~jnp.isin(draft, end_tokens)
    return Draft(draft, _leading(usable), None)


def ask(
    assistant: CausalLM,
    state: State,
    settings: StepSettings,
    limit: Int[Array, " R"],
    tokens: int,
    confidence: Float[Array, ""],
) -> tuple[Draft, KVCache]:
    """Drafts by the assistant, which stops where it is less sure of a token than `confidence`."""
    rows = state.finished.shape[0]
    endless = settings._replace(end_tokens=settings.end_tokens[:0], max_new_tokens=jnp.int32(ENDLESS))
    key = None if settings.key is None else jax.random.fold_in(settings.key, DRAFT_DRAWS)
    vocabulary = assistant.config.vocab_size
    drawn = jnp.zeros((tokens, rows, vocabulary if key is not None else 0), jnp.float32)

    def go_on(carry: Any) -> Bool[Array, ""]:
        made, _, _, _, drafting = carry[:5]
        return (made < tokens) & jnp.any(drafting)

    def body(carry: Any) -> Any:
        made, state, draft, drawn, drafting, count = carry
        # The cache lacks the latest token, and the one before it if the last draft was accepted whole.
        logits, state, _ = next_logits(
            assistant, state, settings.rope, width=2, aligned=False, outputs=frozenset()
        )
        scores = settings.after_host(state.sequences, process(logits, state.sequences, settings))
        token = choose(scores, state.sequences.new, key)
        probability = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), token[:, None], axis=1)[:, 0]
        count += drafting
        drafting &= (probability >= confidence) & (count < limit) & ~jnp.isin(token, settings.end_tokens)
        if key is not None:
            drawn = drawn.at[made].set(scores)
        state = append(state, token[:, None], jnp.ones_like(token), endless)
        return made + 1, state, draft.at[:, made].set(token), drawn, drafting, count

    drafting = ~state.finished & (limit > 0)
    carry = (
        jnp.int32(0),
        state,
        jnp.zeros((rows, tokens), jnp.int32),
        drawn,
        drafting,
        jnp.zeros(rows, jnp.int32),
    )
    _, after, draft, drawn, _, count = jax.lax.while_loop(go_on, body, carry)
    scores = None if key is None else drawn.swapaxes(0, 1)
    return Draft(draft, count, scores), after.cache


def draft_limit(config: Any, sequences: Sequences, settings: StepSettings, most: int) -> Int[Array, " R"]:
    """Tokens that each row may draft: within its length, and all under one rope list.

    Tokens beyond `original_max_position_embeddings` need the long list, those before it the short one, so a
    draft never reaches across.
    """
    limit = jnp.clip(settings.max_new_tokens - sequences.new - 1, 0, most)
    if "long_factor" in dict(config.rope_scaling.parameters):
        tokens = sequences.tokens
        crosses = frequencies_change(config, settings.rope, settings.rope.length(tokens), tokens + most)
        within = jnp.maximum(config.original_max_position_embeddings - tokens, 0)
        limit = jnp.where(crosses, jnp.minimum(limit, within), limit)
    return limit


def verify(
    model: CausalLM, state: State, settings: StepSettings, draft: Draft, outputs: frozenset[str]
) -> tuple[State, Int[Array, "R n"], Records]:
    """Runs the drafts through the model, keeps what it would have said itself, and adds a token."""
    sequences = state.sequences
    width = draft.tokens.shape[1] + 1
    offset = jnp.arange(sequences.ids.shape[1]) - sequences.length[:, None]
    drafted = (offset >= 0) & (offset < draft.length[:, None])
    places = jnp.clip(offset, 0, width - 2)
    ids = jnp.where(drafted, jnp.take_along_axis(draft.tokens, places, axis=1), sequences.ids)
    ahead = Sequences(
        ids, sequences.mask | drafted, sequences.length + draft.length, sequences.new + draft.length
    )

    count = jnp.where(state.finished, 0, draft.length + 1)
    wanted = {f"output_{name}": True for name in outputs & {"attentions", "hidden_states"}}
    out, fed = feed(model, replace(state, sequences=ahead), settings.rope, count, width, **wanted)

    def score(position: Int[Array, ""], logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
        seen = Sequences(
            ids, ahead.mask & (offset < position), sequences.length + position, sequences.new + position
        )
        return settings.after_host(seen, process(logits, seen, settings))

    scores = jax.vmap(score, in_axes=(0, 1), out_axes=1)(jnp.arange(width), out.logits)  # [R, k + 1, V]
    tokens, made = _accept(scores, sequences, draft, settings)
    ended = jnp.isin(tokens, settings.end_tokens) & (jnp.arange(width) < made[:, None])
    made = jnp.where(jnp.any(ended, axis=1), jnp.argmax(ended, axis=1) + 1, made)

    made = jnp.where(state.finished, 0, made)
    cache = fed.cache.rewind(jnp.where(state.finished, state.cache.length, sequences.length + made - 1))
    state = append(State(sequences, state.finished, cache), tokens, made, settings)
    records = kept(out, outputs) | {
        name: value for name, value in {"logits": out.logits, "scores": scores}.items() if name in outputs
    }
    return state, jnp.where(jnp.arange(width) < made[:, None], tokens, NO_TOKEN), records


def _accept(
    scores: Float[Array, "R n V"], sequences: Sequences, draft: Draft, settings: StepSettings
) -> tuple[Int[Array, "R n"], Int[Array, " R"]]:
    """Tokens of each row and how many of them count: accepted drafts and one more."""
    width = scores.shape[1]
    position = jnp.arange(width)
    key = settings.key
    if draft.scores is None or key is None:
        # The model's own choice at every place, valid as long as the draft was what it chose.
        own = jax.vmap(lambda at, s: choose(s, sequences.new + at, settings.key), (0, 1), 1)(position, scores)
        right = (own[:, :-1] == draft.tokens) & (position[:-1] < draft.length[:, None])
        return own, _leading(right) + 1

    p = jax.nn.softmax(scores, axis=-1)
    q = jax.nn.softmax(draft.scores, axis=-1)
    p_token, q_token = (
        jnp.take_along_axis(x, draft.tokens[..., None], axis=-1)[..., 0] for x in (p[:, :-1], q)
    )
    keys = row_keys(jax.random.fold_in(key, ACCEPT_DRAWS), sequences.new)
    chance = jax.vmap(lambda key: jax.random.uniform(key, (width - 1,)))(keys)
    accepted = _leading((chance * q_token < p_token) & (position[:-1] < draft.length[:, None]))
    # One more token: of what the model would rather have said, or after a whole draft of what it says next.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    at = accepted[:, None, None]
    p_next, q_next = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (p, q))
    refused = (accepted < draft.length)[:, None]
    rest = jnp.where(refused, jnp.maximum(p_next - q_next, 0.0), p_next)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p_next)
    last = choose(jnp.log(rest), sequences.new + accepted, settings.key)
    tokens = jnp.where(position == accepted[:, None], last[:, None], jnp.pad(draft.tokens, ((0, 0), (0, 1))))
    return tokens, accepted + 1


def lookup_loop(
    model: CausalLM,
    state: State,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    *,
    most: int,
    tokens: int,
    max_ngram: int,
    outputs: frozenset[str],
) -> tuple[State, Report]:
    """Up to `steps` <= `most` rounds of prompt lookup and verification, without the host."""

    def one(state: State) -> tuple[State, Int[Array, "R n"], Records]:
        draft = lookup(state.sequences, tokens, max_ngram, settings.end_tokens)
        limit = draft_limit(model.config, state.sequences, settings, tokens)
        return verify(
            model, state, settings, draft._replace(length=jnp.minimum(draft.length, limit)), outputs
        )

    return run_steps(one, model.config, state, settings, steps, most)


def assisted_loop(
    models: tuple[CausalLM, CausalLM],
    pair: AssistedState,
    settings: StepSettings,
    steps: Int[Array, ""] | int,
    assistant_settings: StepSettings,
    confidence: Float[Array, ""],
    *,
    most: int,
    tokens: int,
    outputs: frozenset[str],
) -> tuple[AssistedState, Report]:
    """Up to `steps` <= `most` rounds of drafts by the assistant and verification, without the host.

    The report's `refill` has the assistant's lanes behind the model's.
    """
    model, assistant = models

    def one(pair: AssistedState) -> tuple[AssistedState, Int[Array, "R n"], Records]:
        state = pair.lanes
        limit = draft_limit(model.config, state.sequences, settings, tokens)
        limit = jnp.minimum(limit, draft_limit(assistant.config, state.sequences, assistant_settings, tokens))
        own = replace(state, cache=pair.assistant)
        draft, cache = ask(assistant, own, assistant_settings, limit, tokens, confidence)
        state, made, records = verify(model, state, settings, draft, outputs)
        known = jnp.minimum(cache.length, jnp.maximum(state.sequences.length - 1, 0))
        return AssistedState(state, cache.rewind(known)), made, records

    def stale(pair: AssistedState) -> Bool[Array, " L2"]:
        own = replace(pair.lanes, cache=pair.assistant)
        return jnp.concatenate(
            [
                needs_recomputation(model.config, pair.lanes, settings.rope),
                needs_recomputation(assistant.config, own, assistant_settings.rope),
            ]
        )

    return run_steps(one, model.config, pair, settings, steps, most, stale)


def _leading(true: Bool[Array, "R k"]) -> Int[Array, " R"]:
    """How many at the beginning of each row are True."""
    return jnp.sum(jnp.cumprod(true, axis=1), axis=1, dtype=jnp.int32)
