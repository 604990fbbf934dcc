"""Angles of relative distances, compared with counts over all distances."""

import math

import numpy as np
import pytest
from reference import small_config

from phi3_jax import Phi3Config
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.rope_lab.inspection.angles import critical_pair, text_angles, trained_turns


def trained_on(length: int, theta: float = 10_000.0) -> Phi3Config:
    return small_config(
        max_position_embeddings=length, original_max_position_embeddings=length, rope_theta=theta
    )


@pytest.mark.parametrize(
    ("dim", "theta", "length", "expected"), [(96, 1e4, 2048, 31), (128, 5e5, 8192, 35), (12, 1e4, 40_000, 6)]
)
def test_critical_pair_of_published_models(dim: int, theta: float, length: int, expected: int) -> None:
    """LongRoPE2 gives 31 for Phi-3-mini and 35 for Llama 3; the last model's pairs all make whole turns."""
    config = trained_on(length, theta).replace(head_dim=dim)
    assert critical_pair(config) == expected
    formula = math.ceil(dim / 2 * math.log(length / (2 * math.pi), theta))
    assert expected == min(formula, dim // 2)


def test_unseen_angles_match_a_count_of_all_distances() -> None:
    """A count in whole degrees of each pair's circle."""
    config = trained_on(100, 500.0)
    inv_freq, _ = frequencies_for(parse_rope("yarn:factor=4").apply(config), 400)
    inv_freq = np.stack([config.rope_base.inv_freq(), inv_freq])
    angles = text_angles(config, inv_freq, 330)
    fine = np.arange(0, 100, 1e-3)
    for row, rope in enumerate(inv_freq.astype(float)):
        for pair, (trained, own) in enumerate(
            zip(config.rope_base.inv_freq().astype(float), rope, strict=True)
        ):
            circle = np.zeros(3600, bool)
            circle[(np.degrees(fine * trained) % 360 * 10).astype(int)] = True
            seen = circle[(np.degrees(np.arange(330) * own) % 360 * 10).astype(int)]
            assert angles.unseen[row, pair] == pytest.approx(1 - seen.mean(), abs=4e-3)
            assert angles.turns[row, pair] == pytest.approx(330 * own / (2 * np.pi))
    assert np.count_nonzero(angles.unseen[0] > 0.1) == 6 - critical_pair(config) >= 2
    assert (angles.unseen[1] <= angles.unseen[0]).all()


def test_interpolated_angles_are_all_seen() -> None:
    config = trained_on(64)
    plain = config.rope_base.inv_freq()
    np.testing.assert_array_equal(text_angles(config, plain / 4, 256).unseen, 0)
    np.testing.assert_array_equal(text_angles(config, plain, 64).unseen, 0)
    unseen = text_angles(config, plain, 65).unseen
    assert unseen.tolist() == [0.0] * critical_pair(config) + [pytest.approx(1 / 65)] * (
        6 - critical_pair(config)
    )
    by_layer = text_angles(config, np.stack([plain, plain / 2])[:, None].repeat(3, axis=1), 65)
    assert by_layer.unseen.shape == (2, 3, 6)
    np.testing.assert_array_equal(by_layer.unseen[0], np.tile(unseen, (3, 1)))
    assert (by_layer.unseen[1] == 0).all()
    np.testing.assert_allclose(trained_turns(config), 64 * plain / (2 * np.pi), rtol=1e-6)
