"""The names of classes and their ids."""

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
    """The names of classes, in the order of their ids 0, 1, 2, ...

    Raises:
        UserError: there are no names, or a name occurs twice.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("a label set needs at least one name")
        if len(self._ids) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"the label {twice!r} occurs twice; give every class its own name")

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "Labels":
        """Sorts names, each once: whole numbers by value, others alphabetically, and "O" before BIO tags."""
        unique = set(names)
        if all(_INTEGER.fullmatch(name) for name in unique):
            return cls(tuple(sorted(unique, key=lambda name: (int(name), name))))
        tags = any(name.startswith(_ENTITY) for name in unique)
        return cls(tuple(sorted(unique, key=lambda name: (not tags or name != "O", name))))

    @classmethod
    def from_config(cls, config: Phi3Config) -> "Labels":
        """Returns the labels that a model was trained with."""
        return cls(tuple(config.id2label.values()))

    def extended(self, names: Iterable[str]) -> "Labels":
        """Returns these labels, followed by those of `names` that are not among them, sorted."""
        new = set(names) - set(self.names)
        return Labels(self.names + self.from_names(new).names) if new else self

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def id(self, name: str) -> int:
        """Returns the id of a label.

        Raises:
            UserError: there is no such label.
        """
        if name not in self._ids:
            near = difflib.get_close_matches(name, self.names, n=3) or list(self.names[:5])
            more = ", ..." if len(near) < len(self) else ""
            raise UserError(
                f"label {name!r} is not one of the {len(self)} labels: {', '.join(map(repr, near))}{more}"
            )
        return self._ids[name]

    def ids(self, names: Iterable[str]) -> list[int]:
        """Returns the ids of labels.

        Raises:
            UserError: there is no such label as one of them.
        """
        names = list(names)
        try:
            return list(map(self._ids.__getitem__, names))
        except KeyError:
            return [self.id(name) for name in names]


def label_name(value: Any) -> str:
    """Returns the name of a label that is text or a whole number in a file.

    Raises:
        UserError: it is missing, empty, or of another type.
    """
    if isinstance(value, str) and (name := value.strip()):
        return name
    if isinstance(value, float) and value.is_integer():  # a column with gaps has floats for whole numbers
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
