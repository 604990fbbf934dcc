"""Scores of texts under rope frequencies that differ by layer and key/value head."""

from typing import Any

import numpy as np
import pytest
from compilations import compilations
from reference import GROUPED, on_mesh, pair, small_config
from their_layer_ropes import outputs_of_theirs, unequal_frequencies

from phi3_jax import LayerFrequencies, Phi3ForCausalLM, make_mesh
from phi3_jax.evaluation.scorer import Scorer

TOKENS = 45


def text(rows: int | None = None) -> np.ndarray:
    return np.random.default_rng(1).integers(4, 96, TOKENS if rows is None else (rows, TOKENS))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pair("causal", small_config(), tmp_path_factory.mktemp("model"), seed=1)


@pytest.mark.parametrize("by_head", [False, True])
def test_losses_match_transformers(models: Any, by_head: bool) -> None:
    """The first tokens keep the model's frequencies."""
    ours, theirs = models
    frequencies = unequal_frequencies(ours.config, by_head=by_head)
    inv_freq, scaling = frequencies.with_all_axes(ours.config, 1)
    losses = Scorer(ours, chunk=16).score(text(), frequencies, initial_tokens=5).losses
    expected = outputs_of_theirs(theirs, text()[None], inv_freq.squeeze(1), scaling, 5)["losses"]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_rows_of_a_population_match_each_alone(models: Any) -> None:
    """Other frequencies of the same shapes run in the same programs."""
    scorer = Scorer(models[0], chunk=16)
    frequencies = unequal_frequencies(scorer.config, rows=3)
    initial = np.array([0, 5, 20])
    together = scorer.score(text(), frequencies, initial_tokens=initial).total
    alone = [
        scorer.score(
            text(), LayerFrequencies(*(each[row] for each in frequencies)), initial_tokens=initial[row]
        ).total[0]
        for row in range(3)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len({round(each, 2) for each in together}) == 3
    with compilations() as programs:
        one = scorer.score(text(), unequal_frequencies(scorer.config)).total[0]
    assert programs == []
    assert abs(one / together - 1).min() > 1e-4


def test_rejects_shapes_that_do_not_fit(models: Any) -> None:
    scorer = Scorer(models[0])
    frequencies = unequal_frequencies(scorer.config, rows=3)
    with pytest.raises(ValueError, match="have 2, 3, 3, 1 rows; each must have one, or as many"):
        scorer.score(text(2), frequencies)
    with pytest.raises(
        ValueError, match=r"shape \[1, 2, 6\]; expected \[2, 6\], \[2, 2, 6\] or \[B, 2, 2, 6\],"
    ):
        scorer.score(text(), frequencies._replace(inv_freq=frequencies.inv_freq[:1, 0]))
    with pytest.raises(ValueError, match="LayerFrequencies has its own attention_scaling; give no other"):
        scorer.score(text(), frequencies, 1.1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=8", "fsdp=2,tensor=2,context=2"])
def test_matches_one_device_on_a_mesh(sizes: str) -> None:
    one = Phi3ForCausalLM(small_config(**GROUPED))
    frequencies = unequal_frequencies(one.config, rows=3)
    expected = Scorer(one, chunk=16).score(text(), frequencies, initial_tokens=3).total
    divided = Scorer(on_mesh(one, make_mesh(sizes)), chunk=16)
    np.testing.assert_allclose(
        divided.score(text(), frequencies, initial_tokens=3).total, expected, rtol=1e-5
    )
