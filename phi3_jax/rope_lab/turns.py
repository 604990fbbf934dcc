"""How often pairs of rotary dims turn within a text."""

import math

import numpy as np
from jaxtyping import Float

from phi3_jax.config.rope_types import RopeBase


def turns(inv_freq: Float[np.ndarray, "... P"], length: float) -> Float[np.ndarray, "... P"]:
    """Returns how often each pair turns within `length` tokens: length / wavelength."""
    return inv_freq.astype(np.float64) * (length / (2 * math.pi))


def theoretical_pair(base: RopeBase, trained: float) -> int:
    """Returns the first pair of plain rope that does not complete a turn in the trained length; P if all do.

    It is half of LongRoPE2's theoretical critical dimension, 2 ceil(d/2 log_theta(trained / 2 pi)).
    """
    return int(np.count_nonzero(turns(base.inv_freq(), trained) >= 1))
