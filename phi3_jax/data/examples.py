"""The tokenised set in flat arrays, compact enough for a thousand million tokens."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from jaxtyping import Bool, Int, Shaped

from phi3_jax.data.batches import permutation
from phi3_jax.data.rows import Place
from phi3_jax.data.tasks import Example
from phi3_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Examples:
    """Token ids, labels and origins of examples; a subset shares the flat arrays of the whole.

    The arrays are read-only, and so are the views of them that the methods give.
    """

    starts: Int[np.ndarray, "examples"]
    """Where each example begins in the flat arrays."""
    lengths: Int[np.ndarray, "examples"]
    """Tokens of each example, int32."""
    labels: Shaped[np.ndarray, "examples ..."] | None
    """Of whole examples: a class, int32 [n], or numbers, float32 [n, C]; otherwise None."""
    truncated: Bool[np.ndarray, "examples"]
    """Examples that lost tokens to the longest length."""
    origins: "tuple[Place, ...]"
    """The first place of each file."""
    origin_numbers: Int[np.ndarray, "examples"]
    lines: Int[np.ndarray, "examples"]
    flat_input_ids: Int[np.ndarray, "tokens"]
    flat_labels: Int[np.ndarray, "tokens"] | None
    flat_firsts: Bool[np.ndarray, "tokens"] | None

    @classmethod
    def gather(cls, examples: "Iterable[Example]") -> "Examples":
        """Collects examples one by one, so that they need not be in memory as Python objects together.

        Raises:
            ValueError: an example without tokens, or with labels of another kind or size than those before.
        """
        growing = _Growing()
        for example in examples:
            growing.add(example)
        return growing.done()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what `row` gives."""
        return ("input_ids",) if self.flat_labels is None else ("input_ids", "labels")

    def row(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        """What a batch holds for every token of an example."""
        if self.flat_labels is None:
            return {"input_ids": self.input_ids(index)}
        return {"input_ids": self.input_ids(index), "labels": self.token_labels(index)}

    def input_ids(self, index: int) -> Int[np.ndarray, "T"]:
        return self.flat_input_ids[self._span(index)]

    def token_labels(self, index: int) -> Int[np.ndarray, "T"]:
        """The label of each token, -100 where it has none.

        Raises:
            ValueError: labels are of whole examples, or there are none.
        """
        if self.flat_labels is None:
            raise UserError(f"{self.place(index)} has no labels of tokens")
        return self.flat_labels[self._span(index)]

    def firsts(self, index: int) -> Bool[np.ndarray, "T"] | None:
        """Which tokens begin a word, where examples are made of words."""
        return None if self.flat_firsts is None else self.flat_firsts[self._span(index)]

    def place(self, index: int) -> str:
        """File and line that the example comes from."""
        return str(self.origins[self.origin_numbers[index]]._replace(line=int(self.lines[index])))

    def subset(self, indices: Int[np.ndarray, "chosen"]) -> "Examples":
        """These examples in this order."""
        chosen = np.asarray(indices)
        return replace(
            self,
            starts=_fixed(self.starts[chosen]),
            lengths=_fixed(self.lengths[chosen]),
            labels=None if self.labels is None else _fixed(self.labels[chosen]),
            truncated=_fixed(self.truncated[chosen]),
            origin_numbers=_fixed(self.origin_numbers[chosen]),
            lines=_fixed(self.lines[chosen]),
        )

    def split(self, fraction: float, seed: int) -> "tuple[Examples, Examples]":
        """Training and validation examples, each in the order they had here.

        All examples made of one row of a file stay together. Where they have one class, validation takes the
        same share of each class as far as whole numbers allow, and leaves at least one of each to train on.

        Args:
            fraction: of the rows, for validation; at least one is taken.

        Raises:
            ValueError: a fraction outside 0 to 1, or too few rows to take any away.
        """
        if not 0 < fraction < 1:
            raise UserError(f"fraction={fraction} of the rows for validation; expected between 0 and 1")
        places = self.origin_numbers * (np.max(self.lines, initial=0) + 1) + self.lines
        _, first, row_of = np.unique(places, return_index=True, return_inverse=True)
        rows = len(first)
        classes = np.zeros(rows, int)
        if self.labels is not None and self.labels.ndim == 1:
            _, classes = np.unique(self.labels[first], return_inverse=True)
        counts = np.bincount(classes)
        spare = int(np.sum(counts - 1))
        if not spare:
            raise UserError(
                f"none of {rows} rows can be set aside for validation without taking the last of its class; "
                "add rows, or give a validation file"
            )
        taken = _shares(counts, fraction, min(max(1, round(fraction * rows)), spare))
        shuffled = permutation(rows, seed)
        by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
        rank = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
        aside = np.zeros(rows, bool)
        aside[by_class] = rank < np.repeat(taken, counts)
        return self.subset(np.flatnonzero(~aside[row_of])), self.subset(np.flatnonzero(aside[row_of]))

    def fingerprint(self) -> str:
        """A digest of tokens and labels in their order, by which a resumed run knows its data again.

        Files and lines do not count: data may move.
        """
        digest = hashlib.blake2b(digest_size=16)
        flats = [self.flat_input_ids, self.flat_labels, self.flat_firsts]
        digest.update(repr([flat is not None for flat in flats]).encode())
        digest.update(self.lengths.tobytes())
        if self.labels is not None:
            digest.update(repr((self.labels.dtype.str, self.labels.shape)).encode())
            digest.update(self.labels.tobytes())
        stops = self.starts + self.lengths
        gaps = np.flatnonzero(self.starts[1:] != stops[:-1]) + 1
        for flat in flats:
            if flat is not None and len(self):
                # Neighbours are read at once: nearly everything is, but for a shuffled subset.
                for first, last in zip([0, *gaps], [*(gaps - 1), len(self) - 1], strict=True):
                    digest.update(flat[self.starts[first] : stops[last]].data)
        return digest.hexdigest()

    def _span(self, index: int) -> slice:
        start = self.starts[index]
        return slice(start, start + self.lengths[index])


class _Growing:
    """Arrays that grow by a share of their size, as examples come."""

    def __init__(self) -> None:
        self.lengths, self.input_ids, self.token_labels = array("i"), array("i"), array("i")
        self.classes, self.numbers = array("i"), array("f")
        self.firsts, self.truncated = array("b"), array("b")
        self.origins: dict[tuple[str, str], tuple[int, Place]] = {}
        self.origin_numbers, self.lines = array("i"), array("q")
        self.form: tuple[str, int, bool] | None = None

    def add(self, example: "Example") -> None:
        ids, labels, firsts, place = example.input_ids, example.labels, example.firsts, example.place
        if not ids:
            raise UserError(f"{place} has no tokens; remove it")
        kind, size = _kind(labels)
        form = kind, size, firsts is not None
        self.form = self.form or form
        if form != self.form:
            raise UserError(f"{place} has {_words(form)}; the examples before it have {_words(self.form)}")
        if not isinstance(labels, list):
            self.classes.extend([] if labels is None else [labels])
        elif kind == "numbers":
            self.numbers.extend(labels)
        else:
            _check_size(place, "labels", labels, ids)
            self.token_labels.extend(cast("list[int]", labels))
        if firsts is not None:
            _check_size(place, "marks of a word's first token", firsts, ids)
            self.firsts.extend(firsts)
        self.input_ids.fromlist(ids)
        self.lengths.append(len(ids))
        self.truncated.append(example.truncated)
        number, _ = self.origins.setdefault((place.file, place.unit), (len(self.origins), place))
        self.origin_numbers.append(number)
        self.lines.append(place.line)

    def done(self) -> Examples:
        kind, size, words = self.form or ("none", 0, False)
        lengths = _fixed(np.asarray(self.lengths))
        labels = None
        if kind == "class":
            labels = _fixed(np.asarray(self.classes))
        elif kind == "numbers":
            labels = _fixed(np.asarray(self.numbers).reshape(-1, size))
        return Examples(
            starts=_fixed(np.cumsum(lengths, dtype=np.int64) - lengths),
            lengths=lengths,
            labels=labels,
            truncated=_fixed(np.asarray(self.truncated).view(bool)),
            origins=tuple(place for _, place in self.origins.values()),
            origin_numbers=_fixed(np.asarray(self.origin_numbers)),
            lines=_fixed(np.asarray(self.lines)),
            flat_input_ids=_fixed(np.asarray(self.input_ids)),
            flat_labels=_fixed(np.asarray(self.token_labels)) if kind == "tokens" else None,
            flat_firsts=_fixed(np.asarray(self.firsts).view(bool)) if words else None,
        )


def _kind(labels: int | list[float] | list[int] | None) -> tuple[str, int]:
    """What labels are of, and how many numbers a whole example has."""
    if labels is None:
        return "none", 0
    if not isinstance(labels, list):
        return "class", 1
    if labels and isinstance(labels[0], float):
        return "numbers", len(labels)
    return "tokens", 0


def _words(form: tuple[str, int, bool]) -> str:
    kind, size, words = form
    labels = {"none": "no labels", "class": "one class", "tokens": "labels of tokens"}
    return labels.get(kind, f"{size} numbers as labels") + (" and marked words" if words else "")


def _check_size(place: object, what: str, values: Sequence[float], ids: list[int]) -> None:
    if len(values) != len(ids):
        raise UserError(f"{place} has {len(values)} {what}; expected one for each of its {len(ids)} tokens")


def _shares(counts: np.ndarray, fraction: float, total: int) -> np.ndarray:
    """How many of each class to take, `total` together: its fraction rounded down, then one more to those
    that lost most by it; at least one of each is left.
    """
    exact = counts * fraction
    taken = np.floor(exact).astype(int)
    while (missing := total - int(taken.sum())) > 0:
        open_classes = np.flatnonzero(taken < counts - 1)
        most_lost = np.argsort((taken - exact)[open_classes], kind="stable")
        taken[open_classes[most_lost[:missing]]] += 1
    return taken


def _fixed(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values
