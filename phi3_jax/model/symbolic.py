"""Comparisons of sizes that `jax.export` may leave open."""

from collections.abc import Callable

from jax.errors import InconclusiveDimensionOperation


def is_certain(comparison: Callable[[], bool]) -> bool:
    """Returns whether a comparison of sizes holds, for all values of those that are open."""
    try:
        return comparison()
    except InconclusiveDimensionOperation:
        return False
