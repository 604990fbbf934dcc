"""Refuses the arguments of transformers that are not supported, unless they have no effect."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from phi3_jax.errors import UserError


class UnsupportedArgument(NamedTuple):
    """An argument of transformers that is not supported, and its values without effect, which pass."""

    advice: str
    neutral: tuple[Any, ...] = ()
    """Values that ask for nothing; None does not, either."""


def refuse(
    method: str,
    given: Mapping[str, Any],
    table: Mapping[str, UnsupportedArgument],
    supported: Collection[str],
) -> None:
    """Refuses every argument among `given` that would change the result.

    Raises:
        UserError: transformers has the argument, and it is not supported.
        TypeError: there is no such argument.
    """
    for name, value in given.items():
        if name not in table:
            close = difflib.get_close_matches(name, [*supported, *table], n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(supported)}"
            raise TypeError(f"{method} has no argument {name!r}; {hint}")
        if value is not None and not any(value is other or value == other for other in table[name].neutral):
            raise UserError(f"{method}: {name}={value!r:.60} is not supported; {table[name].advice}")
