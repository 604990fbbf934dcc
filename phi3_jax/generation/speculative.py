"""Assisted generation: drafts several tokens and checks them in one forward; the results stay the same.

Drafts come from an assistant model, or from earlier text (prompt lookup). Sampling with an assistant is
Algorithm 1 of Leviathan et al. (2023), https://arxiv.org/abs/2211.17192.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.forward import (
    Records,
    feed,
    frequencies_change,
    needs_recomputation,
    next_logits,
    output_flags,
    process,
    select_outputs,
)
from phi3_jax.generation.protocol import CausalLM
from phi3_jax.generation.sampling import Report, choose, row_keys, run_steps
from phi3_jax.generation.sequences import Sequences
from phi3_jax.generation.state import NO_TOKEN, State, StepSettings, append
from phi3_jax.sizes import INT32_MAX

DRAFT_KEY, ACCEPT_KEY = 1 << 30, (1 << 30) + 1
"""Folded into the key for draws other than the model's own."""


class Draft(NamedTuple):
    """Proposed tokens: the first `length` of each row."""

    tokens: Int[Array, "R k"]
    length: Int[Array, " R"]
    scores: Float[Array, "R k V"] | None
    """The logits that the tokens were drawn from; None if they were not drawn."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AssistedState:
    """The model's state and the assistant's cache of the same sequences."""

    state: State
    assistant: KVCache

    @property
    def sequences(self) -> Sequences:
        return self.state.sequences

    @property
    def finished(self) -> Bool[Array, " R"]:
        return self.state.finished

    @property
    def cache(self) -> KVCache:
        return self.state.cache

    @property
    def assistant_state(self) -> State:
        """The assistant's own state."""
        return self.state.with_cache(self.assistant)

    def with_cache(self, cache: KVCache) -> "AssistedState":
        return replace(self, state=self.state.with_cache(cache))

    def resize(self, slots: int) -> "AssistedState":
        assistant = self.assistant if self.assistant.window is not None else self.assistant.resize(slots)
        return AssistedState(self.state.resize(slots), assistant)

    def truncate(self, new: Int[Array, " R"], finished: Bool[Array, " R"]) -> "AssistedState":
        state = self.state.truncate(new, finished)
        length = jnp.minimum(self.assistant.length, state.cache.length)
        return AssistedState(state, self.assistant.rewind(length))


def lookup(sequences: Sequences, tokens: int, max_ngram: int, end_tokens: Int[Array, " E"]) -> Draft:
    """Drafts the tokens that followed the latest n-gram where it first occurred; tries longer n-grams first.

    A draft stops before an end token, because no token after it may be accepted.
    """
    slots = sequences.ids.shape[1]
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    start = jnp.full(sequences.length.shape, slots, jnp.int32)  # the draft's first slot; `slots`: none yet
    for size in range(max_ngram, 0, -1):
        latest, is_token = sequences.last(size)
        same = jnp.ones(sequences.ids.shape, bool)
        for offset in range(size):
            shifted = jnp.roll(sequences.ids, -offset, axis=1) == latest[:, offset, None]
            same &= shifted & jnp.roll(sequences.mask, -offset, axis=1)
        same &= (slot + size < sequences.length[:, None]) & jnp.all(is_token, axis=1)[:, None]
        first = jnp.argmax(same, axis=1).astype(jnp.int32) + size
        start = jnp.where((start == slots) & jnp.any(same, axis=1), first, start)
    sources = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    draft = jnp.take_along_axis(sequences.ids, sources, axis=1, mode="clip")
    usable = (sources < sequences.length[:, None]) & ~jnp.isin(draft, end_tokens)
    return Draft(draft, _leading(usable), None)


def draft_with(
    assistant: CausalLM,
    state: State,
    settings: StepSettings,
    limit: Int[Array, " R"],
    tokens: int,
    confidence: Float[Array, ""],
) -> tuple[Draft, KVCache]:
    """Drafts with the assistant, which stops after a token of less probability than `confidence`."""
    rows = state.finished.shape[0]
    unlimited = settings._replace(end_tokens=settings.end_tokens[:0], max_new_tokens=jnp.int32(INT32_MAX))
    key = None if settings.key is None else jax.random.fold_in(settings.key, DRAFT_KEY)
    vocabulary = assistant.config.vocab_size
    drawn = jnp.zeros((tokens, rows, vocabulary if key is not None else 0), jnp.float32)

    def continues(carry: Any) -> Bool[Array, ""]:
        done, _, _, _, drafting = carry[:5]
        return (done < tokens) & jnp.any(drafting)

    def body(carry: Any) -> Any:
        done, state, draft, drawn, drafting, count = carry
        # The cache lacks the latest token, and the one before it if the last draft was accepted whole.
        logits, state, _ = next_logits(
            assistant, state, settings.rope, width=2, aligned=False, outputs=frozenset()
        )
        scores = settings.after_host(state.sequences, process(logits, state.sequences, settings))
        token = choose(scores, state.sequences.new, key)
        probability = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), token[:, None], axis=1)[:, 0]
        count += drafting.astype(jnp.int32)
        drafting &= (probability >= confidence) & (count < limit) & ~jnp.isin(token, settings.end_tokens)
        if key is not None:
            drawn = drawn.at[done].set(scores)
        state = append(state, token[:, None], jnp.ones_like(token), unlimited)
        return done + 1, state, draft.at[:, done].set(token), drawn, drafting, count

    drafting = ~state.finished & (limit > 0)
    carry = (
        jnp.int32(0),
        state,
        jnp.zeros((rows, tokens), jnp.int32),
        drawn,
        drafting,
        jnp.zeros(rows, jnp.int32),
    )
    _, state, draft, drawn, _, count = jax.lax.while_loop(continues, body, carry)
    scores = None if key is None else drawn.swapaxes(0, 1)
    return Draft(draft, count, scores), state.cache


def draft_limit(
    config: Phi3Config, sequences: Sequences, settings: StepSettings, most: int
) -> Int[Array, " R"]:
    """Returns how many tokens each row may draft: within its length, and all under the same rope frequencies.

    A forward computes a row under one set of frequencies, so no draft reaches a length that changes them.
    """
    limit = jnp.clip(settings.max_new_tokens - sequences.new - 1, 0, most)
    now = settings.rope.length(sequences.tokens)

    def changes(drafted: Int[Array, ""]) -> Bool[Array, " R"]:
        return frequencies_change(config, settings.rope, now, sequences.tokens + drafted)

    same = ~jax.vmap(changes, out_axes=1)(jnp.arange(1, most + 1, dtype=jnp.int32))
    return jnp.minimum(limit, _leading(same))


def verify(
    model: CausalLM, state: State, settings: StepSettings, draft: Draft, outputs: frozenset[str]
) -> tuple[State, Int[Array, "R n"], Records]:
    """Runs the drafts through the model, accepts what it would have generated, and adds one token."""
    sequences = state.sequences
    width = draft.tokens.shape[1] + 1
    slots = jnp.arange(sequences.ids.shape[1], dtype=jnp.int32)[None]
    offset = slots - sequences.length[:, None]
    is_draft = (offset >= 0) & (offset < draft.length[:, None])
    drafted = jnp.take_along_axis(draft.tokens, jnp.clip(offset, 0, width - 2), axis=1)
    ids = jnp.where(is_draft, drafted, sequences.ids)
    extended = Sequences(
        ids, sequences.mask | is_draft, sequences.length + draft.length, sequences.new + draft.length
    )

    count = jnp.where(state.finished, 0, draft.length + 1)
    out, fed = feed(
        model, replace(state, sequences=extended), settings.rope, count, width, None, **output_flags(outputs)
    )

    def score(position: Int[Array, ""], logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
        seen = Sequences(
            ids, extended.mask & (offset < position), sequences.length + position, sequences.new + position
        )
        return settings.after_host(seen, process(logits, seen, settings))

    positions = jnp.arange(width, dtype=jnp.int32)
    scores = jax.vmap(score, in_axes=(0, 1), out_axes=1)(positions, out.logits)  # [R, k + 1, V]
    tokens, count = _accept(scores, sequences, draft, settings)
    ends = jnp.isin(tokens, settings.end_tokens) & (positions[None] < count[:, None])
    count = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)

    count = jnp.where(state.finished, 0, count)
    cache = fed.cache.rewind(jnp.where(state.finished, state.cache.length, sequences.length + count - 1))
    state = append(State(sequences, state.finished, cache), tokens, count, settings)
    records = select_outputs(out, outputs) | {
        name: value for name, value in {"logits": out.logits, "scores": scores}.items() if name in outputs
    }
    return state, jnp.where(positions[None] < count[:, None], tokens, NO_TOKEN), records


def _accept(
    scores: Float[Array, "R n V"], sequences: Sequences, draft: Draft, settings: StepSettings
) -> tuple[Int[Array, "R n"], Int[Array, " R"]]:
    """Returns tokens of each row and how many of them count: the accepted drafts and one more."""
    width = scores.shape[1]
    position = jnp.arange(width, dtype=jnp.int32)
    key = settings.key
    if draft.scores is None or key is None:
        # The model's own choice at every position is valid as long as the draft agrees with it.
        own = jax.vmap(lambda at, s: choose(s, sequences.new + at, key), (0, 1), 1)(position, scores)
        agrees = (own[:, :-1] == draft.tokens) & (position[None, :-1] < draft.length[:, None])
        return own, _leading(agrees) + 1

    p = jax.nn.softmax(scores, axis=-1)
    q = jax.nn.softmax(draft.scores, axis=-1)
    p_token, q_token = (
        jnp.take_along_axis(x, draft.tokens[..., None], axis=-1)[..., 0] for x in (p[:, :-1], q)
    )
    keys = row_keys(jax.random.fold_in(key, ACCEPT_KEY), sequences.new)
    chance = jax.vmap(lambda key: jax.random.uniform(key, (width - 1,), jnp.float32))(keys)
    accepted = _leading((chance * q_token < p_token) & (position[None, :-1] < draft.length[:, None]))
    # One more token: drawn from p - q after a refused one, from p after a whole draft.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    at = accepted[:, None, None]
    p_next, q_next = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (p, q))
    refused = (accepted < draft.length)[:, None]
    rest = jnp.where(refused, jnp.maximum(p_next - q_next, 0.0), p_next)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p_next)
    last = choose(jnp.log(rest), sequences.new + accepted, key)
    is_last = position[None] == accepted[:, None]
    tokens = jnp.where(is_last, last[:, None], jnp.pad(draft.tokens, ((0, 0), (0, 1))))
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
    """Runs up to `steps` <= `most` rounds of prompt lookup and verification without the host."""

    def round_of_lookup(state: State) -> tuple[State, Int[Array, "R n"], Records]:
        draft = lookup(state.sequences, tokens, max_ngram, settings.end_tokens)
        limit = draft_limit(model.config, state.sequences, settings, tokens)
        return verify(
            model, state, settings, draft._replace(length=jnp.minimum(draft.length, limit)), outputs
        )

    return run_steps(round_of_lookup, model.config, state, settings, steps, most)


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
    """Runs up to `steps` <= `most` rounds of the assistant's drafts and verification without the host.

    The report's `needs_recomputation` has the assistant's rows after the model's.
    """
    model, assistant = models

    def round_of_drafts(pair: AssistedState) -> tuple[AssistedState, Int[Array, "R n"], Records]:
        state = pair.state
        limit = draft_limit(model.config, state.sequences, settings, tokens)
        limit = jnp.minimum(limit, draft_limit(assistant.config, state.sequences, assistant_settings, tokens))
        draft, cache = draft_with(
            assistant, pair.assistant_state, assistant_settings, limit, tokens, confidence
        )
        state, accepted, records = verify(model, state, settings, draft, outputs)
        length = jnp.minimum(cache.length, jnp.maximum(state.sequences.length - 1, 0))
        return AssistedState(state, cache.rewind(length)), accepted, records

    def outdated(pair: AssistedState) -> Bool[Array, " R2"]:
        return jnp.concatenate(
            [
                needs_recomputation(model.config, pair.state, settings.rope),
                needs_recomputation(assistant.config, pair.assistant_state, assistant_settings.rope),
            ]
        )

    return run_steps(round_of_drafts, model.config, pair, settings, steps, most, outdated)


def _leading(true: Bool[Array, "R k"]) -> Int[Array, " R"]:
    """Counts the leading True values of each row."""
    return jnp.sum(jnp.cumprod(true, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
