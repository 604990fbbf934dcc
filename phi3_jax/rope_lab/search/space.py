"""The space of rope scalings that a search explores, and the methods that it starts from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError

BOUND = 1.25
"""The largest factor, relative to the stretch (LongRoPE, table 1)."""

DECIMALS = 4
"""Decimals of a factor that a search draws."""

PLAIN, LINEAR, NTK, YARN, LONGROPE = "none", "linear", "ntk", "yarn", "longrope"


class Individual(NamedTuple):
    """A rope scaling."""

    factors: tuple[float, ...]
    """Divisors of theta^(-2i/d), pair by pair."""
    initial_tokens: int
    """How many first tokens stay unscaled."""
    attention_factor: float


def attention_factor(base: RopeBase, method: str, stretch: float) -> float:
    """Returns the default attention factor of YaRN or longrope."""
    parameters: dict[str, Any] = {"factor": stretch}
    if method == LONGROPE:
        parameters |= dict.fromkeys(("short_factor", "long_factor"), (1.0,) * (base.dim // 2))
    scaling = RopeScaling(method, tuple(sorted(parameters.items())))
    return float(scaling.frequencies(base, jnp.zeros(1, jnp.int32))[1])


def known_scalings(base: RopeBase, stretch: float) -> dict[str, Individual]:
    """Returns the methods that a search starts from, each with its own attention factor.

    They are plain rope, position interpolation, NTK-aware scaling (theta times stretch^(d/(d-2))) and YaRN
    (its ramp depends on `base.original_max_position_embeddings`).
    """
    pairs = base.dim // 2
    numbers = np.arange(pairs)
    yarn, yarn_attention = RopeScaling("yarn", (("factor", stretch),)).frequencies(
        base, jnp.zeros(1, jnp.int32)
    )
    curves = {
        PLAIN: (np.ones(pairs), 1.0),
        LINEAR: (np.full(pairs, stretch), 1.0),
        NTK: (stretch ** (2 * numbers / max(base.dim - 2, 1)), 1.0),
        YARN: (base.inv_freq().astype(np.float64) / np.asarray(yarn), yarn_attention),
    }
    return {
        name: Individual(ascending(np.clip(factors, 1, stretch)), 0, float(attention))
        for name, (factors, attention) in curves.items()
    }


@dataclass(frozen=True)
class Space:
    """The space of individuals: ascending factors from 1 to `bound`, and ranges of the other genes.

    Args:
        attention_factors: the least and the greatest.
        initial_tokens: the choices.
        knot_ends: the pairs between which a line's knots are (`Curve`); None: all but the first.
    """

    bound: float
    attention_factors: tuple[float, float]
    initial_tokens: tuple[int, ...] = (0,)
    knot_ends: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound >= 1):
            raise UserError(f"bound={self.bound!r} must be a number, 1 or more")
        least, greatest = self.attention_factors
        if not 0 < least <= greatest < math.inf:
            raise UserError(f"attention_factors={self.attention_factors!r} must be positive and ascending")
        if 0 not in self.initial_tokens or min(self.initial_tokens) < 0:
            raise UserError(
                f"initial_tokens={self.initial_tokens!r} must be numbers from 0, and 0 among them, since a "
                "config cannot express others"
            )

    def __contains__(self, individual: Individual) -> bool:
        factors = individual.factors
        least, greatest = self.attention_factors
        return (
            factors[0] >= 1
            and factors[-1] <= self.bound
            and all(a <= b for a, b in pairwise(factors))
            and individual.initial_tokens in self.initial_tokens
            and least <= individual.attention_factor <= greatest
        )

    def nearest(self, individual: Individual) -> Individual:
        """Returns the nearest individual in the space without unscaled tokens."""
        factors = tuple(min(max(x, 1.0), self.bound) for x in ascending(np.array(individual.factors)))
        return Individual(factors, 0, self.within(individual.attention_factor))

    def within(self, attention_factor: float) -> float:
        """Returns the nearest attention factor in the space."""
        least, greatest = self.attention_factors
        return min(max(attention_factor, least), greatest)

    def drawn(self, logarithms: Float[np.ndarray, " P"]) -> tuple[float, ...]:
        """Returns ascending factors in the space from drawn logarithms."""
        factors = np.exp(np.array(ascending(logarithms)))
        return tuple(min(float(x), self.bound) for x in np.round(np.maximum(factors, 1), DECIMALS))


def ascending(values: Float[np.ndarray, " P"] | Sequence[float]) -> tuple[float, ...]:
    """Returns the mean of the lowest ascending list above and the highest one below."""
    given = np.asarray(values)
    above = np.maximum.accumulate(given)
    below = np.minimum.accumulate(given[::-1])[::-1]
    return tuple(float(x) for x in (above + below) / 2)
