"""Rope angles of relative distances, and which of them a model saw in training, by pair of rotary dims."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.rope_lab.turns import theoretical_pair, turns


class Angles(NamedTuple):
    """What a text's relative distances are to each pair, P pairs.

    A text of T tokens has distances 0 to T - 1. Modulo one turn, the angles of a pair reach from 0 to the
    smaller of one turn and its turns.
    """

    turns: Float[np.ndarray, "... P"]
    """T / wavelength: the turns from one end of the text to the other."""
    unseen: Float[np.ndarray, "... P"]
    """The share of the distances whose angle, modulo one turn, no distance of a training text has."""


def trained_turns(config: Phi3Config) -> Float[np.ndarray, " P"]:
    """Returns the turns of each pair over a training text: r of YaRN (arXiv:2309.00071, section 3.2).

    The model was trained with plain rope on texts of `trained_length` tokens.
    """
    return turns(config.rope_base.inv_freq(), trained_length(config) * config.position_scale)


def critical_pair(config: Phi3Config) -> int:
    """Returns the first pair that made no whole turn over a training text; the number of pairs if all did.

    LongRoPE2 (arXiv:2502.20082, section 2) has twice this number, the theoretical critical dimension.
    """
    return theoretical_pair(config.rope_base, trained_length(config) * config.position_scale)


def text_angles(config: Phi3Config, inv_freq: Float[np.ndarray, "... P"], length: int) -> Angles:
    """Returns the angles of a text of `length` tokens under other frequencies.

    Distances of a training text, one token apart, leave no gap: the angle of a distance between two of them
    counts as seen, and all are seen by a pair that made a whole turn.
    """
    inv_freq = np.asarray(inv_freq, np.float64)
    seen = np.broadcast_to(trained_turns(config), inv_freq.shape)
    turned = turns(inv_freq, length * config.position_scale)
    unseen = np.zeros(inv_freq.shape)
    distances = np.arange(length) / length
    for index in np.argwhere((seen < 1) & (turned > seen)):
        at = tuple(index)
        unseen[at] = np.mean(distances * turned[at] % 1 >= seen[at])
    return Angles(turned, unseen)
