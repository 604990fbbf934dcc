"""Tests that the device loops lower for platforms that this machine does not have."""

from typing import Any

import jax
import numpy as np
import pytest
from reference import longrope, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.generation import CompiledModel, beam, sampling, speculative
from phi3_jax.generation.request import GenerationRequest

MODEL = Phi3ForCausalLM(small_config(**longrope(), num_hidden_layers=1), dtype="bfloat16")
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
BEAM_RULES = beam.BeamRules(early_stopping=False, end_tokens=1)


def loops(model: Any, state: Any, settings: Any) -> Any:
    """Runs every loop on the same state."""
    none: frozenset[str] = frozenset()
    rows = np.repeat(np.arange(len(state.finished)), 2)
    search = beam.start(state.take(rows), 2, 8, state.finished)
    of_beams = settings._replace(rope=settings.rope.take(rows))
    pair = speculative.AssistedState(state, state.cache)
    return (
        sampling.loop(model, state, settings, 4, most=4, outputs=frozenset({"scores"})),
        speculative.lookup_loop(model, state, settings, 4, most=4, tokens=3, max_ngram=2, outputs=none),
        speculative.assisted_loop(
            (model, model), pair, settings, 4, settings, 0.4, most=4, tokens=3, outputs=none
        ),
        beam.loop(model, search, of_beams, 4, 1.0, most=4, rules=BEAM_RULES, outputs=none),
    )


@pytest.mark.parametrize("cache", [None, "quantized"])
def test_lowers(cache: str | None) -> None:
    ids = np.random.default_rng(0).integers(4, 96, (2, 5))
    options = SAMPLING if cache is None else {"do_sample": False, "cache_implementation": cache}
    request = GenerationRequest(CompiledModel(MODEL), ids, max_new_tokens=8, seed=0, **options)
    engine = request.engine(spare=4)
    settings = engine.settings
    traced = jax.jit(loops).trace(MODEL, engine.state, settings)
    for platform in ("tpu", "cuda"):
        assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()
