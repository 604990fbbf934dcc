"""The search for rope factors, without a model, on a simple function of the factors."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.rope_lab.search.cma_es import CmaEs
from phi3_jax.rope_lab.search.cobyqa import Cobyqa
from phi3_jax.rope_lab.search.curves import Curve
from phi3_jax.rope_lab.search.evolution import Evolution
from phi3_jax.rope_lab.search.search import RopeSearch, Stages
from phi3_jax.rope_lab.search.space import BOUND, Individual, Space, attention_factor, known_scalings

STRETCH = 4.0
BASE = RopeBase(dim=24, theta=10000.0, max_position_embeddings=256, original_max_position_embeddings=256)
KNOWN = known_scalings(BASE, STRETCH)
SPACE = Space(
    bound=BOUND * STRETCH,
    attention_factors=(1.0, KNOWN["yarn"].attention_factor),
    initial_tokens=(0, 2, 8),
)
EVOLUTION = Evolution(population=16, iterations=6, parents=4, mutation_probability=0.3, seed=5)
HIDDEN = np.array([1, 1, 1.02, 1.1, 1.2, 1.5, 2.1, 3.2, 3.9, 4.2, 4.6, 4.9])
"""The best factors."""


def perplexity(individual: Individual) -> float:
    """Least at the hidden factors, with 8 initial tokens and YaRN's attention factor."""
    off = np.log(individual.factors) - np.log(HIDDEN)
    genes = (individual.initial_tokens != 8) + 10 * abs(
        individual.attention_factor - SPACE.attention_factors[1]
    )
    return 10 + float(off @ off) + 0.1 * genes


def finished(method=EVOLUTION, space: Space = SPACE, batch: int = 3, known=KNOWN) -> RopeSearch:
    search = RopeSearch(space, method, known)
    while search.waiting:
        search.add([perplexity(each) for each in search.waiting[:batch]])
    return search


def test_known_scalings_match_the_rope_types():
    for name, text in (("linear", "linear"), ("yarn", "yarn")):
        inv_freq, attention = RopeScaling(text, (("factor", STRETCH),)).frequencies(BASE, np.zeros(1))
        np.testing.assert_allclose(BASE.inv_freq() / np.array(KNOWN[name].factors), inv_freq, rtol=1e-6)
        assert KNOWN[name].attention_factor == attention
    stretched = replace(BASE, theta=BASE.theta * STRETCH ** (BASE.dim / (BASE.dim - 2)))
    np.testing.assert_allclose(
        BASE.inv_freq() / np.array(KNOWN["ntk"].factors), stretched.inv_freq(), rtol=1e-5
    )
    assert set(KNOWN["none"].factors) == {1.0}
    assert KNOWN["yarn"].attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(BASE, "yarn", STRETCH) == KNOWN["yarn"].attention_factor
    longrope = math.sqrt(1 + math.log(4) / math.log(256))
    assert attention_factor(BASE, "longrope", STRETCH) == pytest.approx(longrope)
    assert all(each in SPACE for each in KNOWN.values())


@pytest.mark.parametrize("probability", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_individuals_are_in_the_space_and_unique(seed, probability):
    search = finished(replace(EVOLUTION, seed=seed, mutation_probability=probability))
    assert len(search.scored) == search.total[0] == 16 + 6 * 12
    everyone = [each.individual for each in search.scored]
    assert len(set(everyone)) == len(everyone)
    for individual in everyone:
        factors = np.array(individual.factors)
        assert factors.shape == (12,)
        assert (np.diff(factors) >= 0).all()
        assert factors.min() >= 1
        assert factors.max() <= SPACE.bound
        assert individual.initial_tokens in SPACE.initial_tokens
        assert SPACE.attention_factors[0] <= individual.attention_factor <= SPACE.attention_factors[1]
    assert everyone[:4] == list(KNOWN.values())
    if probability > 0.1:
        assert {each.initial_tokens for each in everyone} == set(SPACE.initial_tokens)
        assert len({each.attention_factor for each in everyone}) > 3


def test_finds_better_individuals():
    search = finished(replace(EVOLUTION, iterations=20))
    start = min(perplexity(each) for each in KNOWN.values())
    assert search.best().perplexity - 10 < 0.25 * (start - 10)
    assert search.best().perplexity == min(each.perplexity for each in search.scored)
    assert search.best(0).individual.initial_tokens == 0
    assert search.best(0).perplexity >= search.best().perplexity


@pytest.mark.parametrize("wanted", list(KNOWN))
def test_result_is_no_worse_than_the_known_scalings(wanted):
    search = RopeSearch(SPACE, EVOLUTION, KNOWN)
    while search.waiting:
        search.add([5.0 if each == KNOWN[wanted] else 6.0 for each in search.waiting])
    assert search.best() == search.best(0) == (KNOWN[wanted], 5.0, 0)


def test_result_depends_on_the_seed_and_not_on_the_batch():
    one, other = finished(batch=1), finished(batch=16)
    assert one.scored == other.scored
    assert finished(replace(EVOLUTION, seed=6)).scored[4:] != one.scored[4:]


@pytest.mark.parametrize("stop", [0, 1, 4, 16, 17, 40, 87, 88])
def test_resumes_from_added_perplexities(stop):
    whole = finished()
    again = RopeSearch(SPACE, EVOLUTION, KNOWN)
    for individual, measured, _ in whole.scored[:stop]:
        assert again.waiting[0] == individual
        again.add([measured])
    while again.waiting:
        again.add([perplexity(each) for each in again.waiting[:5]])
    assert again.scored == whole.scored


def test_measures_individuals_outside_and_uses_their_nearest():
    only = Space(bound=3.0, attention_factors=(1.1, 1.1))
    own = Individual(tuple(np.linspace(2, 1, 12)), 0, 1.05)  # descending
    search = finished(space=only, known=KNOWN | {"own": own})
    everyone = [each.individual for each in search.scored]
    assert everyone[:5] == [*KNOWN.values(), own]
    outside = [each for each in everyone if each not in only]
    assert outside == everyone[:5]
    assert len(everyone) == search.total[0] == 5 + 16 + 6 * 12
    assert everyone[5] == Individual((3.0,) * 12, 0, 1.1)
    assert everyone[8] == Individual((1.5,) * 12, 0, pytest.approx(1.1))
    assert search.best().individual in only


def test_nan_counts_as_infinite():
    search = RopeSearch(SPACE, EVOLUTION, KNOWN)
    while search.waiting:
        search.add([math.nan if each != KNOWN["ntk"] else math.inf for each in search.waiting])
    assert search.best().perplexity == math.inf
    search = RopeSearch(SPACE, EVOLUTION, KNOWN)
    while search.waiting:
        search.add([7.0 if each == KNOWN["ntk"] else math.nan for each in search.waiting])
    assert search.best() == (KNOWN["ntk"], 7.0, 0)


def test_ends_when_the_space_is_exhausted():
    tiny = Space(bound=1.0001, attention_factors=(1.0, 1.0))
    search = finished(space=tiny, known={"none": KNOWN["none"], "linear": Individual((1.0001,) * 12, 0, 1.0)})
    assert len(search.scored) == len({each.individual for each in search.scored}) <= 13


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"parents=16 must be from 2 to population - 1 = 15"):
        Evolution(population=16, parents=16)
    with pytest.raises(ValueError, match="mutation_probability=0 must be above 0"):
        Evolution(mutation_probability=0)
    with pytest.raises(ValueError, match="population=3 is too small for the 4"):
        RopeSearch(SPACE, Evolution(population=3, parents=2), KNOWN)
    with pytest.raises(ValueError, match="and 0 among them"):
        Space(bound=2.0, attention_factors=(1.0, 1.0), initial_tokens=(4,))
    with pytest.raises(ValueError, match=r"bound=0\.5"):
        Space(bound=0.5, attention_factors=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"attention_factors=.* must be positive and ascending"):
        Space(bound=2.0, attention_factors=(1.1, 1.0))
    search = RopeSearch(SPACE, EVOLUTION, KNOWN)
    search.add([1.0] * 3)
    with pytest.raises(ValueError, match="2 perplexities for 1"):
        search.add([1.0, 2.0])
    with pytest.raises(ValueError, match="population=2 must be at least 3"):
        CmaEs(population=2)
    with pytest.raises(ValueError, match="knots=1 must be at least 2"):
        CmaEs(knots=1)
    with pytest.raises(ValueError, match="knots=13 must be at most the 12 pairs"):
        RopeSearch(replace(SPACE, initial_tokens=(0,)), CmaEs(knots=13), KNOWN)
    with pytest.raises(ValueError, match=r"COBYQA needs the perplexity .* use one stage"):
        RopeSearch(SPACE, Cobyqa(), KNOWN, Stages(kept=(0.5,)))
    with pytest.raises(ValueError, match="only the evolution can choose initial_tokens"):
        RopeSearch(SPACE, CmaEs(), KNOWN)
    with pytest.raises(ValueError, match=r"kept=\(0,\) must be shares"):
        Stages(kept=(0,))
    with pytest.raises(ValueError, match="finalists=-1 must not be negative"):
        Stages(finalists=-1)


NO_TOKENS = replace(SPACE, initial_tokens=(0,))


def test_optimizers_of_curves_need_fewer_evaluations_than_evolution():
    def left(method) -> float:
        search = finished(method, space=NO_TOKENS)
        assert len(search.scored) == search.total[0] <= 4 + 84
        assert all(each.individual in NO_TOKENS for each in search.scored)
        assert len({each.individual for each in search.scored}) == len(search.scored)
        return search.best().perplexity - 10.1  # a tenth is for the initial tokens

    seeds = range(4)
    evolution = np.mean([left(Evolution(16, 6, 4, 0.3, seed)) for seed in seeds])
    cma = np.mean([left(CmaEs(population=8, iterations=10, knots=6, seed=seed)) for seed in seeds])
    assert left(Cobyqa(iterations=80, knots=8)) < 0.2 * cma < 0.2 * 0.7 * evolution


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 30])
@pytest.mark.parametrize(
    "method", [CmaEs(population=8, iterations=5, knots=4, seed=3), Cobyqa(iterations=30, knots=4)]
)
def test_optimizers_of_curves_resume_and_do_not_depend_on_the_batch(method, stop):
    whole = finished(method, space=NO_TOKENS, batch=1)
    assert finished(method, space=NO_TOKENS, batch=5).scored == whole.scored
    again = RopeSearch(NO_TOKENS, method, KNOWN)
    again.add([each.perplexity for each in whole.scored[: min(stop, 4)]])
    for _, measured, _ in whole.scored[4:stop]:
        again.add([measured])
    while again.waiting:
        again.add([perplexity(each) for each in again.waiting[:5]])
    assert again.scored == whole.scored


def test_cma_es_depends_on_the_seed():
    one, other = (finished(CmaEs(iterations=1, knots=4, seed=seed), space=NO_TOKENS) for seed in (3, 4))
    assert one.scored[:4] == other.scored[:4]
    assert one.scored[4:] != other.scored[4:]


def test_cobyqa_goes_on_after_infinite_and_missing_perplexities():
    search = RopeSearch(NO_TOKENS, Cobyqa(iterations=25, knots=4), KNOWN)
    odd = {2: math.inf, 7: math.nan, 12: math.inf}
    while search.waiting:
        value = odd.get(len(search.scored)) or perplexity(search.waiting[0])
        search.add([value])
    assert len(search.scored) == 4 + 25
    assert search.best().perplexity < min(perplexity(each) for each in KNOWN.values())


def test_curves_keep_the_numbers_of_individuals():
    space = replace(NO_TOKENS, knot_ends=(2.5, 9.0))
    curve = Curve(space, pairs=12, knots=5)
    draws = np.random.default_rng(0)
    for _ in range(20):
        numbers = np.append(draws.uniform(0, 0.19, 5), draws.uniform(*curve.bounds[-1]))
        individual = curve.individual(numbers)
        assert individual in space
        assert individual.factors[0] == 1.0
        assert len(set(individual.factors[9:])) == 1
        again = curve.individual(curve.numbers(individual))
        assert again.attention_factor == individual.attention_factor
        assert again.factors[9] == pytest.approx(individual.factors[9], rel=2e-4)
    assert curve.individual(np.full(6, 9.0)).factors[-1] == space.bound


def test_cma_es_keeps_a_single_attention_factor():
    search = finished(CmaEs(iterations=3), space=replace(NO_TOKENS, attention_factors=(1.05, 1.05)))
    assert {each.individual.attention_factor for each in search.scored[7:]} == {1.05}


def test_cma_es_ends_when_rounded_factors_repeat():
    tiny = Space(bound=1.0003, attention_factors=(1.0, 1.0))
    search = finished(CmaEs(iterations=50, knots=2), tiny, known={"none": KNOWN["none"]})
    assert not search.waiting
    assert len(search.scored) < 100


def rough(individual: Individual) -> float:
    """Orders most individuals as `perplexity` does, and ends in another place."""
    return perplexity(individual) + 0.3 * individual.factors[5]


@pytest.mark.parametrize("method", [EVOLUTION, CmaEs(population=9, iterations=6, knots=4, seed=5)])
def test_stages_measure_the_best_of_each_generation_again(method):
    stages = Stages(kept=(0.5, 0.2), finalists=2)
    search = RopeSearch(NO_TOKENS, method, KNOWN, stages)
    measures = [rough, perplexity, perplexity, lambda each: 2 * perplexity(each)]
    while search.waiting:
        search.add([measures[search.stage](each) for each in search.waiting[:3]])
    most = search.total
    counts = {stage: len(search.results(stage)) for stage in range(4)}
    assert all(counts[stage] <= most[stage] + method.iterations for stage in range(4))
    assert counts[0] > counts[1] > counts[2] > counts[3] == 4 + 2
    for known in KNOWN.values():
        assert all(known in search.results(stage) for stage in range(4))
    for iteration in range(1, search.iteration + 1):
        by_stage = [
            {
                each.individual: each.perplexity
                for number, each in zip(search.iterations, search.scored, strict=True)
                if number == iteration and each.stage == stage
            }
            for stage in range(3)
        ]
        for before, after in pairwise(by_stage):
            dropped = [value for each, value in before.items() if each not in after]
            assert len(after) < len(before)
            assert max(before[each] for each in after) <= min(dropped)
    last = sorted(search.results(2).values())
    assert search.best().stage == 3
    assert search.best().perplexity == 2 * last[0]
    assert {value / 2 for value in search.results(3).values()} >= set(last[:2])


def test_finalists_are_decided_on_held_out_text():
    search = RopeSearch(NO_TOKENS, EVOLUTION, KNOWN, Stages(finalists=2))
    while search.waiting:
        held_out = search.stage == search.stages.held_out
        search.add([(10.0 if each == KNOWN["ntk"] else 20.0) if held_out else perplexity(each)
                    for each in search.waiting])  # fmt: skip
    assert search.best() == (KNOWN["ntk"], 10.0, 1)
