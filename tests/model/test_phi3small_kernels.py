"""Tests Phi-3-small with the kernels for TPUs, which are interpreted, against XLA's attention."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from phi3small import small_config
from reference import distance, gradients, padding_mask, random_ids

from phi3_jax import Phi3SmallForCausalLM
from phi3_jax.model.abstract import abstract_model
from phi3_jax.model.remat import REMAT_POLICIES, Remat

TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_with_pallas_equal_xla(side: str) -> None:
    model = Phi3SmallForCausalLM(small_config(), rngs=1)
    mask = padding_mask(3, 53, side)
    ids = random_ids(model.config, mask)
    labels = np.where((mask == 1) & (np.cumsum(mask, axis=1) > 1), ids, -100)
    results = []
    for implementation in ("xla", "pallas"):
        model.set_attn_implementation(implementation)
        out, gradient = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
        results.append({"logits": np.asarray(out.logits)[mask == 1], "loss": out.loss, **gradient})
    expected, actual = results
    assert {name: distance(actual[name], x) <= TOLERANCE for name, x in expected.items()} == dict.fromkeys(
        actual, True
    )


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "quantized"])
def test_tokens_with_pallas_equal_xla(cache: str | None) -> None:
    """The prompts are longer than the nearest blocks, and rows end in different blocks."""
    model = Phi3SmallForCausalLM(small_config(), rngs=1)
    mask = padding_mask(3, 53, "left")
    ids = random_ids(model.config, mask)
    generated = []
    for implementation in ("xla", "pallas"):
        model.set_attn_implementation(implementation)
        generated.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=12, cache_implementation=cache)
        )
    assert generated[0].shape[1] > 60
    np.testing.assert_array_equal(*generated)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "attention"])
def test_policies_keep_the_results_of_attention(capsys: pytest.CaptureFixture[str], remat: Remat) -> None:
    """Each group of query heads has results of its own."""
    config = small_config(num_hidden_layers=1, max_position_embeddings=512)
    model = abstract_model(Phi3SmallForCausalLM, config, dtype=jnp.bfloat16)
    model.decoder.remat_policy = REMAT_POLICIES[remat]
    ids = np.ones((3, 256), np.int32)
    print_saved_residuals(lambda model: model(ids, labels=ids).loss, model)
    kept = capsys.readouterr().out
    assert ("f32[2,3,2,1,256]" in kept) == (remat == "attention")
