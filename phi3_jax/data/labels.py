"""The names of classes, and the number that each one has."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError

_INTEGER = re.compile(r"-?[0-9]+")
_ENTITY = ("B-", "I-")


@dataclass(frozen=True)
class Labels:
    """A label set, in the order of its numbers 0, 1, 2, ...

    Raises:
        ValueError: no names, or one of them twice.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("a label set needs at least one name")
        if len(self._ids) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"the label {twice!r} is there twice; give every class a name of its own")

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "Labels":
        """Every name once: whole numbers by value, others by the alphabet, and "O" before BIO tags."""
        found = set(names)
        if all(_INTEGER.fullmatch(name) for name in found):
            return cls(tuple(sorted(found, key=lambda name: (int(name), name))))
        tags = any(name.startswith(_ENTITY) for name in found)
        return cls(tuple(sorted(found, key=lambda name: (not tags or name != "O", name))))

    @classmethod
    def from_config(cls, config: Phi3Config) -> "Labels":
        """The label set that a model was trained with."""
        return cls(tuple(config.id2label.values()))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def id(self, name: str) -> int:
        """The number of a label.

        Raises:
            ValueError: there is no such label.
        """
        if name not in self._ids:
            near = difflib.get_close_matches(name, self.names, n=3) or list(self.names[:5])
            more = ", ..." if len(near) < len(self) else ""
            raise UserError(
                f"label {name!r} is not among the {len(self)} known: {', '.join(map(repr, near))}{more}"
            )
        return self._ids[name]

    def to_config(self) -> dict[str, Any]:
        """Fields of `Phi3Config`, which makes `label2id` of them itself."""
        return {"id2label": dict(enumerate(self.names)), "num_labels": len(self)}


def label_name(value: Any) -> str:
    """A label as files hold it, text or whole number, as text.

    Raises:
        ValueError: it is missing, empty, or neither.
    """
    if isinstance(value, float) and value.is_integer():  # a column with gaps makes floats of whole numbers
        value = int(value)
    if not isinstance(value, (str, int)):
        raise UserError(
            "label is missing"
            if value is None
            else f"label is {value!r:.40}; expected text or a whole number"
        )
    name = str(value).strip()
    if not name:
        raise UserError("label is empty")
    return name
