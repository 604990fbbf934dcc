"""Filtered logits against transformers' warpers, and the tokens drawn against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from phi3_jax.generation import Sampling
from phi3_jax.generation.sampling import filter_logits, next_token

VOCAB = 50
SETTINGS = [
    (temperature, top_k, top_p)
    for temperature in (1.0, 0.3, 2.5)
    for top_k in (0, 1, 7, VOCAB, 10 * VOCAB)
    for top_p in (1.0, 0.9, 0.5, 1e-6)
]


def theirs(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """transformers' warpers in the order that its generate applies them."""
    scores = torch.tensor(logits)
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.numpy()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_filter_is_that_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (8, VOCAB)).astype(np.float32)
    ours = np.asarray(filter_logits(jnp.asarray(logits), temperature, top_k, top_p))
    expected = theirs(logits, temperature, top_k, top_p)
    assert np.array_equal(np.isfinite(ours), np.isfinite(expected))
    assert np.isfinite(ours).any(axis=-1).all()
    assert np.allclose(ours[np.isfinite(ours)], expected[np.isfinite(expected)], rtol=1e-6)


def test_settings_do_not_compile_anew() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 3, (2, VOCAB)).astype(np.float32))
    compiled = jax.jit(filter_logits)
    for setting in ((0.7, 5, 0.8), (1.0, 0, 1.0)):
        assert np.allclose(compiled(logits, *setting), filter_logits(logits, *setting), rtol=1e-6)
    assert compiled._cache_size() == 1


def test_ties_at_the_kth_place_all_stay() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    ours = np.asarray(filter_logits(jnp.asarray(logits), 1.0, 2, 1.0))
    assert np.array_equal(ours, theirs(logits, 1.0, 2, 1.0))
    assert np.isfinite(ours).tolist() == [[False, True, True, True, True, False]]


def test_ties_at_the_border_of_top_p_share_their_fate() -> None:
    """transformers keeps as many of equal tokens as the sum needs, whichever its sort puts first."""
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2]], np.float32))
    ours = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), 1.0, 0, 0.7)))
    expected = np.isfinite(theirs(logits, 1.0, 0, 0.7))
    assert expected.sum() == 3
    assert ours.all()
    assert (ours | ~expected).all()


def test_what_is_excluded_already_stays_excluded() -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, [3, 9]] = 1.0, 2.0
    for setting in SETTINGS:
        kept = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), *setting)))[0].nonzero()[0]
        assert set(kept) <= {3, 9}
        assert 9 in kept


def test_half_precision_logits_are_filtered_in_float32() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (4, VOCAB)).astype(np.float32)
    halves = jnp.asarray(logits, jnp.bfloat16)
    ours = filter_logits(halves, 0.7, 9, 0.9)
    assert ours.dtype == jnp.float32
    widened = np.asarray(halves.astype(jnp.float32))
    assert np.array_equal(np.isfinite(ours), np.isfinite(theirs(widened, 0.7, 9, 0.9)))


def test_without_a_key_the_most_likely_token() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (64, VOCAB)).astype(np.float32)
    tokens = next_token(jnp.asarray(logits), None)
    assert tokens.dtype == jnp.int32
    assert np.array_equal(tokens, torch.tensor(logits).argmax(-1).numpy())
    tied = jnp.asarray([[0.0, 5.0, 1.0, 5.0]])
    assert next_token(tied, None).tolist() == [torch.tensor([0.0, 5.0, 1.0, 5.0]).argmax().item()] == [1]


@pytest.mark.parametrize(
    "setting", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 6, 1.0), (1.0, 0, 0.8), (1.3, 8, 0.9)]
)
def test_draws_follow_the_probabilities(setting: tuple[float, int, float]) -> None:
    """Chi-square of 20,000 draws; the limit is that of one chance in a million."""
    logits = np.random.default_rng(4).normal(0, 1.5, (1, 12)).astype(np.float32)
    draws = 20_000
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, 12))
    tokens = np.asarray(jax.jit(next_token)(rows, jax.random.key(0), *setting))
    expected = draws * torch.tensor(theirs(logits, *setting)).softmax(-1).numpy()[0]
    found = np.bincount(tokens, minlength=12)
    possible = expected > 0
    assert not found[~possible].any()
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4.9 * np.sqrt(2 * freedom) + 20  # above the 1 - 1e-6 quantile for 1 to 11
    assert possible.sum() >= 3


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.1), "temperature=-0.1 is negative"),
        (Sampling(top_k=-1), "top_k=-1 is negative"),
        (Sampling(top_p=0.0), r"top_p=0.0 is not in \(0, 1\]"),
        (Sampling(top_p=1.1), r"top_p=1.1 is not in \(0, 1\]"),
        (Sampling(top_p=float("nan")), "top_p=nan"),
    ],
)
def test_settings_that_cannot_be(sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.check()
    Sampling(0.7, 50, 0.9).check()
