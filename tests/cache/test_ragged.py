"""Tests caches whose rows have different numbers of slots."""

from typing import Any

import jax
import numpy as np
import pytest
from marks import slow
from reference import longrope, on_mesh, run, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.cache import KVCache
from phi3_jax.parallel.sharding import make_mesh


def prefill(model: Phi3ForCausalLM, ids: np.ndarray, slots: int) -> KVCache:
    """Returns a cache with these ids, of which the first row's first is padding."""
    mask = np.ones_like(ids)
    mask[0, 0] = 0
    cache = model.init_cache(len(ids), slots)
    return run(model, input_ids=ids, attention_mask=mask, past_key_values=cache).past_key_values


CHANGES: dict[str, dict[str, Any]] = {"plain": {}, "longrope": longrope(), "window": {"sliding_window": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, None) for name in CHANGES),
        *(slow(name, "data=2,tensor=2") for name in CHANGES),
    ],
)
def test_a_step_equals_the_steps_of_each_cache(name: str, mesh: str | None) -> None:
    model = Phi3ForCausalLM(small_config(**CHANGES[name]))
    if mesh is not None:
        model = on_mesh(model, make_mesh(mesh, jax.devices()[:4]))
    draws = np.random.default_rng(0)
    prompts = [draws.integers(4, 96, (2, 9)), draws.integers(4, 96, (4, 20))]
    whole = KVCache.concatenate(
        [prefill(model, ids, slots) for ids, slots in zip(prompts, (12, 32), strict=True)]
    )
    apart = [prefill(model, ids, slots) for ids, slots in zip(prompts, (12, 32), strict=True)]
    for _ in range(2):
        token = draws.integers(4, 96, (6, 1))
        out = run(model, input_ids=token, past_key_values=whole)
        parts = [
            run(model, input_ids=tokens, past_key_values=cache)
            for tokens, cache in zip((token[:2], token[2:]), apart, strict=True)
        ]
        expected = np.concatenate([part.logits for part in parts])
        np.testing.assert_allclose(out.logits, expected, rtol=1e-5, atol=1e-5)
        whole, apart = out.past_key_values, [part.past_key_values for part in parts]
    assert whole.keys[0].shape == (6, 2, 32, 12)
    assert [part.shape[2] for part in whole.keys[0].parts] == [12, 32]


def test_a_ragged_cache_gives_no_attentions() -> None:
    model = Phi3ForCausalLM(small_config())
    ids = np.full((1, 3), 7)
    cache = KVCache.concatenate([prefill(model, ids, 8), prefill(model, ids, 16)])
    with pytest.raises(ValueError, match="rows of different sizes gives no attentions"):
        model(np.full((2, 1), 7), past_key_values=cache, output_attentions=True)
