"""The formulas of the critical pair, and the search of it with measurements in closed form."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.critical.candidates import candidate_factors, crossing, next_candidates
from phi3_jax.rope_lab.critical.plan import CriticalPlan, PairScaling
from phi3_jax.rope_lab.turns import theoretical_pair, turns

BASE = RopeBase(64, 100_000.0, 16384, 8192)
"""SmolLM2's, stretched twice."""


@pytest.mark.parametrize(
    ("dim", "theta", "trained", "pair"),
    [(96, 1e4, 2048, 31), (128, 5e5, 8192, 35), (64, 1e5, 8192, 20), (64, 1e4, 6, 0), (64, 10.0, 4096, 32)],
)
def test_theoretical_pair_is_that_of_the_paper(dim: int, theta: float, trained: int, pair: int) -> None:
    """The first two are Phi-3-mini and Llama 3 8B (arXiv:2502.20082, section 3)."""
    base = RopeBase(dim, theta, trained, trained)
    assert theoretical_pair(base, trained) == pair
    formula = math.ceil(dim / 2 * math.log(trained / (2 * math.pi), theta))
    assert pair == min(max(formula, 0), dim // 2)
    turned = turns(base.inv_freq(), trained)
    assert all(turned[:pair] >= 1)
    assert all(turned[pair:] < 1)


def test_candidates_grow_geometrically_up_to_the_stretch() -> None:
    factors = np.array(candidate_factors(8, 4, 16.0))
    assert factors == pytest.approx([1, 2, 4, 8, 16, 16, 16, 16])
    assert candidate_factors(8, 0, 16.0) == (16.0,) * 8


def test_candidates_contain_linear_and_ntk() -> None:
    """The same ropes are not measured twice."""
    plan = CriticalPlan(BASE)
    assert plan.scalings(0) == [plan.known["linear"]]
    assert plan.scalings(31) == [plan.known["ntk"]]
    assert len(set(plan.waiting({}))) == len(plan.waiting({})) == 4 + 9 - 2


def test_stretched_pairs_have_no_new_angles() -> None:
    pair = theoretical_pair(BASE, 8192)
    factors = np.array(candidate_factors(32, pair, BASE.extension))
    assert np.all((turns(BASE.inv_freq(), 16384) / factors)[pair:] <= turns(BASE.inv_freq(), 8192)[pair:])


def find(plan: CriticalPlan, perplexity: Callable[[PairScaling], float]) -> dict[PairScaling, float]:
    """Measures everything, and checks how many ropes were to come."""
    values: dict[PairScaling, float] = {}
    while waiting := plan.waiting(values):
        most = len(values) + len(waiting) + plan.later(values)
        values |= {each: perplexity(each) for each in waiting}
        assert len(values) <= most
    assert plan.later(values) == 0
    return values


@pytest.mark.parametrize("optimum", [0, 1, 6, 13, 20, 27, 29, 30, 31])
def test_finds_a_known_pair(optimum: int) -> None:
    """A fake with one minimum, on which the factors of each candidate depend."""
    plan = CriticalPlan(BASE)
    goal = np.log(candidate_factors(32, optimum, 2.0))

    def perplexity(scaling: PairScaling) -> float:
        return math.exp(float(np.abs(np.log(scaling.factors) - goal).sum()))

    values = find(plan, perplexity)
    assert plan.best(values).pair == optimum
    assert len(values) <= 16


def test_known_optimum_also_over_attention_factors() -> None:
    plan = CriticalPlan(BASE, [10, 14, 20], yarn_attention=True)

    def perplexity(scaling: PairScaling) -> float:
        return abs(sum(scaling.factors) - sum(candidate_factors(32, 14, 2.0))) + 2 - scaling.attention_factor

    values = find(plan, perplexity)
    best = plan.best(values)
    assert (best.pair, best.scaling.attention_factor) == (14, pytest.approx(0.1 * math.log(2) + 1))
    assert [each.pair for each in plan.measured(values)] == [10, 10, 14, 14, 20, 20]


def test_single_pairs_are_measured_in_the_best_candidate() -> None:
    """The loss of a pair depends on it alone: pairs before 18 are better plain, later ones stretched."""

    def perplexity(scaling: PairScaling) -> float:
        logs = np.log2(scaling.factors)
        return math.exp(float(np.where(np.arange(32) < 18, logs, 1 - logs) @ np.linspace(1, 2, 32)))

    plan = CriticalPlan(BASE, [8, 16, 24], pairs=range(32))
    values = find(plan, perplexity)
    effects = plan.effects(values)
    assert [each.pair for each in effects] == list(range(32))
    assert [each.plain < each.stretched for each in effects] == [True] * 18 + [False] * 14
    best = plan.best(values)
    plain = (*best.scaling.factors[:20], 1.0, *best.scaling.factors[21:])
    assert effects[20].plain == perplexity(PairScaling(plain))
    assert effects[30].stretched == best.perplexity
    # The best candidate has 1 at pair 0 and 2 from pair 24 on (or 16), so that no rope is measured twice.
    assert len(values) == 4 + 3 + 2 * 32 - (1 + 32 - best.pair)
    losses = [
        {each.pair: math.log(getattr(each, kind)) for each in effects} for kind in ("plain", "stretched")
    ]
    assert crossing(*losses) == 18


def test_crossing_sums_losses() -> None:
    assert crossing({3: 1.0, 4: 1.0, 6: 1.0}, {3: 2.0, 4: 2.0, 6: 1.5}) == 7
    assert crossing({3: 1.0, 4: 2.0, 6: 1.0}, {3: 2.0, 4: 1.0, 6: 1.5}) == 4
    assert crossing({3: 1.0, 4: 1.2, 6: 1.0}, {3: 2.0, 4: 1.0, 6: 1.5}) == 7
    assert crossing({3: 2.0}, {3: 1.0}) == 3
    assert crossing({3: math.inf}, {3: 1.0}) is None


def test_refinement_halves_the_distance_to_neighbours() -> None:
    assert next_candidates({0: 3.0, 8: 1.0, 16: 2.0}) == [4, 12]
    assert next_candidates({0: 3.0, 4: 2.0, 8: 1.0, 9: 2.0}) == [6]
    assert next_candidates({7: 3.0, 8: 1.0, 9: 2.0}) == []
    assert next_candidates({0: 1.0, 8: math.nan}) == [4]
    assert next_candidates({0: math.nan, 8: math.inf, 16: 1.0}) == [12]


def test_rejects_pairs_that_the_model_lacks() -> None:
    with pytest.raises(UserError, match="candidates: 32 must be from 0 to 31"):
        CriticalPlan(BASE, [3, 32])
    with pytest.raises(UserError, match="pairs: -1 must be from 0 to 31"):
        CriticalPlan(BASE, pairs=[-1])
    with pytest.raises(UserError, match="candidates: give at least one pair"):
        CriticalPlan(BASE, [])


def test_first_candidates_are_closer_in_a_model_of_few_pairs() -> None:
    for pairs, first in ((1, [0]), (2, [0, 1]), (6, [0, 1, 2, 3, 4, 5]), (17, [*range(0, 17, 2)])):
        plan = CriticalPlan(RopeBase(2 * pairs, 1e4, 64, 32))
        assert plan.candidates({}) == first
        values = find(plan, lambda scaling: sum(scaling.factors))
        assert plan.best(values).pair == pairs - 1
