"""The critical pair of a rope: from which pair of dims on a longer context needs interpolation.

A pair that turns less than once within the trained length meets new angles beyond it. The first such pair
is the theoretical critical pair. LongRoPE2 (arXiv:2502.20082, section 3) holds that the real one is faster:
pairs that turn only a few times are trained too little, so they need interpolation, too. The paper counts in
dims, of which a pair has two.

This module has the formulas and no model.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np


def candidate_factors(pairs: int, critical: int, stretch: float) -> tuple[float, ...]:
    """Returns the factors on plain rope's wavelengths if `critical` is the critical pair.

    From it on they are the stretch, the least with which no angle is new. Before it they grow as in NTK-aware
    scaling, geometrically from 1 at pair 0. So 0 is position interpolation, and the last pair is NTK-aware
    scaling.
    """
    numbers = np.arange(pairs)
    shares = np.minimum(numbers / critical, 1) if critical else np.ones(pairs)
    return tuple((stretch**shares).tolist())


def coarse_candidates(pairs: int, step: int) -> list[int]:
    """Returns every `step`-th pair, and the last."""
    return sorted({*range(0, pairs, step), pairs - 1})


def next_candidates(values: Mapping[int, float]) -> list[int]:
    """Returns the pairs to measure next, halfway between the best one so far and its measured neighbours.

    There are none once the best one's next pairs are measured, or lie outside those that are measured.

    Args:
        values: the perplexity of each measured pair.
    """
    best = best_candidate(values)
    return [
        (one + other) // 2
        for one, other in pairwise(sorted(values))
        if best in (one, other) and other - one > 1
    ]


def best_candidate(values: Mapping[int, float]) -> int:
    """Returns the pair with the least perplexity, of equals the first; NaN counts as infinite."""
    return min(sorted(values), key=lambda pair: math.inf if math.isnan(values[pair]) else values[pair])


def with_factor(factors: Sequence[float], pair: int, factor: float) -> tuple[float, ...]:
    """Returns the factors with another one at one pair."""
    return (*factors[:pair], factor, *factors[pair + 1 :])


def crossing(plain: Mapping[int, float], stretched: Mapping[int, float]) -> int | None:
    """Returns the pair that best divides those that are better plain from those that are better stretched.

    It is the pair from which the sum of the lesser losses is least if the earlier pairs are plain and the
    others stretched, of equals the first; None if not all losses are finite.

    Args:
        plain: the loss with factor 1, by pair.
        stretched: the loss with the stretch as the factor, by pair.
    """
    pairs = sorted(plain)
    gains = [plain[pair] - stretched[pair] for pair in pairs]
    if not all(map(math.isfinite, gains)):
        return None
    later = [sum(gains[number:]) for number in range(len(pairs) + 1)]
    best = max(range(len(later)), key=lambda number: later[number])
    return pairs[best] if best < len(pairs) else pairs[-1] + 1
