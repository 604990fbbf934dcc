"""The search for rope factors, without a model, on a simple function of the factors."""

import math
from dataclasses import replace

import numpy as np
import pytest

from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.rope_lab.search import (
    BOUND,
    Evolution,
    Individual,
    RopeSearch,
    Space,
    attention_factor,
    known_scalings,
)

STRETCH = 4.0
BASE = RopeBase(dim=24, theta=10000.0, max_position_embeddings=256, original_max_position_embeddings=256)
KNOWN = known_scalings(BASE, STRETCH)
SPACE = Space(
    bound=BOUND * STRETCH,
    attention_factors=(1.0, attention_factor(BASE, "longrope", STRETCH), KNOWN["yarn"].attention_factor),
    initial_tokens=(0, 2, 8),
)
EVOLUTION = Evolution(population=16, iterations=6, parents=4, mutation_probability=0.3, seed=5)
HIDDEN = np.array([1, 1, 1.02, 1.1, 1.2, 1.5, 2.1, 3.2, 3.9, 4.2, 4.6, 4.9])
"""The best factors."""


def perplexity(individual: Individual) -> float:
    """Least at the hidden factors, with 8 initial tokens and YaRN's attention factor."""
    off = np.log(individual.factors) - np.log(HIDDEN)
    genes = (individual.initial_tokens != 8) + 10 * abs(
        individual.attention_factor - SPACE.attention_factors[2]
    )
    return 10 + float(off @ off) + 0.1 * genes


def finished(
    evolution: Evolution = EVOLUTION, space: Space = SPACE, batch: int = 3, known=KNOWN
) -> RopeSearch:
    search = RopeSearch(space, evolution, known)
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
    assert len(search.scored) == search.total == 16 + 6 * 12
    everyone = [individual for individual, _ in search.scored]
    assert len(set(everyone)) == len(everyone)
    for individual in everyone:
        factors = np.array(individual.factors)
        assert factors.shape == (12,)
        assert (np.diff(factors) >= 0).all()
        assert factors.min() >= 1
        assert factors.max() <= SPACE.bound
        assert individual.initial_tokens in SPACE.initial_tokens
        assert individual.attention_factor in SPACE.attention_factors
    assert everyone[:4] == list(KNOWN.values())
    if probability > 0.1:
        assert {each.initial_tokens for each in everyone} == set(SPACE.initial_tokens)
        assert {each.attention_factor for each in everyone} == set(SPACE.attention_factors)


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
    assert search.best() == search.best(0) == (KNOWN[wanted], 5.0)


def test_result_depends_on_the_seed_and_not_on_the_batch():
    one, other = finished(batch=1), finished(batch=16)
    assert one.scored == other.scored
    assert finished(replace(EVOLUTION, seed=6)).scored[4:] != one.scored[4:]


@pytest.mark.parametrize("stop", [0, 1, 4, 16, 17, 40, 87, 88])
def test_resumes_from_added_perplexities(stop):
    whole = finished()
    again = RopeSearch(SPACE, EVOLUTION, KNOWN)
    for individual, measured in whole.scored[:stop]:
        assert again.waiting[0] == individual
        again.add([measured])
    while again.waiting:
        again.add([perplexity(each) for each in again.waiting[:5]])
    assert again.scored == whole.scored


def test_measures_individuals_outside_and_uses_their_nearest():
    only = Space(bound=3.0, attention_factors=(1.1,))
    own = Individual(tuple(np.linspace(2, 1, 12)), 0, 1.05)  # descending
    search = finished(space=only, known=KNOWN | {"own": own})
    everyone = [individual for individual, _ in search.scored]
    assert everyone[:5] == [*KNOWN.values(), own]
    outside = [each for each in everyone if each not in only]
    assert outside == everyone[:5]
    assert len(everyone) == search.total == 5 + 16 + 6 * 12
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
    assert search.best() == (KNOWN["ntk"], 7.0)


def test_ends_when_the_space_is_exhausted():
    tiny = Space(bound=1.0001, attention_factors=(1.0,))
    search = finished(space=tiny, known={"none": KNOWN["none"], "linear": Individual((1.0001,) * 12, 0, 1.0)})
    assert len(search.scored) == len({individual for individual, _ in search.scored}) <= 13


def test_rejects_wrong_arguments():
    with pytest.raises(ValueError, match=r"parents=16 must be from 2 to population - 1 = 15"):
        Evolution(population=16, parents=16)
    with pytest.raises(ValueError, match="mutation_probability=0 must be above 0"):
        Evolution(mutation_probability=0)
    with pytest.raises(ValueError, match="population=3 is too small for the 4"):
        RopeSearch(SPACE, Evolution(population=3, parents=2), KNOWN)
    with pytest.raises(ValueError, match="and 0 among them"):
        Space(bound=2.0, attention_factors=(1.0,), initial_tokens=(4,))
    with pytest.raises(ValueError, match=r"bound=0\.5"):
        Space(bound=0.5, attention_factors=(1.0,))
    search = RopeSearch(SPACE, EVOLUTION, KNOWN)
    search.add([1.0] * 15)
    with pytest.raises(ValueError, match="2 perplexities for 1"):
        search.add([1.0, 2.0])
