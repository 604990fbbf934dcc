"""A rope as two lists of factors, which is all that other programs know of a rope that they do not name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.sources.gguf_file import shortest_decimal

_PROBES = 64
"""The number of lengths, up to the context, at which frequencies are compared."""


class RopeFactors(NamedTuple):
    """Factors on the wavelengths of plain rope, for rows up to the original length and for longer ones."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    short_attention: float
    """The factor on cosines and sines of short rows."""
    long_attention: float

    reader: str
    """The program that the factors are for, as errors name it."""

    @property
    def attention(self) -> float:
        """The attention factor of both lists.

        Raises:
            UserError: there are two.
        """
        if self.short_attention != self.long_attention:
            raise UserError(
                f"the attention factor is {self.short_attention:.6g} for short texts and "
                f"{self.long_attention:.6g} for long ones; {self.reader} has one for both lists"
            )
        return self.long_attention


def rope_factors(config: Phi3Config, reader: str) -> RopeFactors:
    """Returns the factors that give the frequencies of a config's rope, to float32.

    `reader` is the program that they are for, as errors name it.

    Raises:
        UserError: the frequencies depend on a text's length in another way than by two lists.
    """
    base, scaling = config.rope_base, config.rope_scaling
    last = base.original_max_position_embeddings
    steps = np.geomspace(1, max(config.context_length, last + 1), _PROBES)
    lengths = np.unique([*steps.astype(np.int64), last, last + 1])
    with jax.ensure_compile_time_eval():
        frequencies, attention = scaling.frequencies(base, jnp.asarray(lengths, jnp.int32))
    inv_freq = np.broadcast_to(np.asarray(frequencies, np.float32), (len(lengths), base.dim // 2))
    attention_factors = np.broadcast_to(np.asarray(attention, np.float64), len(lengths))
    numbers = np.column_stack([inv_freq, attention_factors])
    is_long = lengths > last
    if not all((part == part[0]).all() for part in (numbers[~is_long], numbers[is_long])):
        raise UserError(
            f"rope type {scaling.rope_type!r} changes its frequencies with a text's length, and not only at "
            f"{last:,} tokens; {reader} has nothing but a list for short texts and one for long texts"
        )
    given = dict(scaling.parameters)
    first, second = (int(np.argmax(part)) for part in (~is_long, is_long))
    return RopeFactors(
        short=_factors(base, inv_freq[first], given.get("short_factor")),
        long=_factors(base, inv_freq[second], given.get("long_factor")),
        short_attention=_attention(attention_factors[first]),
        long_attention=_attention(attention_factors[second]),
        reader=reader,
    )


def _factors(base: RopeBase, inv_freq: Float[np.ndarray, "P"], given: Any) -> tuple[float, ...]:
    """Returns the factors on plain rope's wavelengths: those of the entry if they have the same effect."""
    if isinstance(given, Sequence) and len(given) == len(inv_freq):
        numbers = np.asarray(given, np.float32)
        if np.allclose(1 / (numbers * base.tokens_per_radian()), inv_freq, rtol=1e-6, atol=0):
            return tuple(given)
    factors = base.inv_freq().astype(np.float64) / inv_freq.astype(np.float64)
    return tuple(shortest_decimal(each) for each in factors)


def _attention(value: float) -> float:
    """Returns a factor as a Python float; one that was computed in float32 is its shortest decimal."""
    return shortest_decimal(value) if np.float32(value) == value else float(value)
