"""Tokens of one answer, one by one, as they come."""

from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from phi3_jax.generation.step import CompiledModel, Sampling
from phi3_jax.model.rope import rope_list_changes


def stream_tokens(
    compiled: CompiledModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields the tokens that follow `prompt`, an end token included, after which it stops.

    The next step is on its way before a token is looked at, so the device never waits for the host. Where the
    sequence grows past `original_max_position_embeddings` under longrope, it is computed again with the long
    list, as in the reference.

    Raises:
        ValueError: an empty prompt, one longer than the context, sampling settings that cannot be.
    """
    config = compiled.model.config
    sampling = sampling or Sampling()
    sampling.check()
    context = config.max_position_embeddings
    if not len(prompt):
        raise ValueError("the prompt is empty: there is nothing to continue")
    if len(prompt) >= context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and the model's context is {context}; shorten the prompt"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be positive")
    limit = min(len(prompt) + max_new_tokens, context)
    key = jax.random.key(seed)

    def step_key(length: int) -> jax.Array | None:
        return jax.random.fold_in(key, length) if sampling.temperature > 0 else None

    one = np.ones((1, 1), np.int32)
    ids = list(prompt)
    token, cache = compiled.prefill(np.asarray(ids, np.int32), limit, step_key(len(ids)), sampling)
    for length in range(len(prompt) + 1, limit + 1):  # tokens once `token` is among them
        following = None
        before, after = np.array([length - 1]), np.array([length], np.int32)
        recompute = bool(rope_list_changes(config, before, after)[0])
        if length < limit and not recompute:
            following = compiled.step(token[:, None], one, cache, after, step_key(length), sampling)
        ids.append(int(token[0]))
        yield ids[-1]
        if ids[-1] in end_tokens or length == limit:
            return
        if following is None:
            following = compiled.prefill(np.asarray(ids, np.int32), limit, step_key(length), sampling)
        token, cache = following
