"""Tokenised examples in flat arrays, compact enough for a billion tokens."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from jaxtyping import Bool, Int, Shaped

from phi3_jax.data.batches import permutation
from phi3_jax.data.encoding import Example
from phi3_jax.data.rows import Place
from phi3_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Examples:
    """Token ids, labels and places of examples; a subset shares the flat arrays of all examples.

    The arrays, and the views of them that the methods return, are read-only.
    """

    starts: Int[np.ndarray, "examples"]
    """Start of each example in the flat arrays."""
    lengths: Int[np.ndarray, "examples"]
    """Number of tokens of each example, int32."""
    labels: Shaped[np.ndarray, "examples ..."] | None
    """Labels of whole examples: classes, int32 [n], or numbers, float32 [n, C]; otherwise None."""
    truncated: Bool[np.ndarray, "examples"]
    """Whether an example lost tokens to the maximum length."""
    origins: tuple[Place, ...]
    """A place in each file."""
    origin_numbers: Int[np.ndarray, "examples"]
    """Index into `origins` of each example."""
    lines: Int[np.ndarray, "examples"]
    flat_input_ids: Int[np.ndarray, "tokens"]
    flat_labels: Int[np.ndarray, "tokens"] | None
    flat_firsts: Bool[np.ndarray, "tokens"] | None

    @classmethod
    def gather(cls, examples: Iterable[Example]) -> "Examples":
        """Collects examples one by one, so that only one at a time is a Python object.

        Raises:
            UserError: an example has no tokens, or its labels differ in kind or size from those before.
        """
        builder = _Builder()
        for example in examples:
            builder.add(example)
        return builder.build()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of `row`."""
        return ("input_ids",) if self.flat_labels is None else ("input_ids", "labels")

    def row(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        """Returns the values of an example that have one element per token."""
        if self.flat_labels is None:
            return {"input_ids": self.input_ids(index)}
        return {"input_ids": self.input_ids(index), "labels": self.token_labels(index)}

    def input_ids(self, index: int) -> Int[np.ndarray, "T"]:
        return self.flat_input_ids[self._span(index)]

    def token_labels(self, index: int) -> Int[np.ndarray, "T"]:
        """Returns the label of each token, -100 for none.

        Raises:
            UserError: the tokens are not labelled.
        """
        if self.flat_labels is None:
            raise UserError(f"{self.place(index)} has no labels for its tokens")
        return self.flat_labels[self._span(index)]

    def firsts(self, index: int) -> Bool[np.ndarray, "T"] | None:
        """Returns which tokens are the first of a word, if the examples consist of words."""
        return None if self.flat_firsts is None else self.flat_firsts[self._span(index)]

    def place(self, index: int) -> str:
        """Returns the file and line of the example."""
        return str(self.origins[self.origin_numbers[index]]._replace(line=int(self.lines[index])))

    def subset(self, indices: Int[np.ndarray, "chosen"]) -> "Examples":
        """Returns these examples in this order."""
        chosen = np.asarray(indices)
        return replace(
            self,
            starts=_read_only(self.starts[chosen]),
            lengths=_read_only(self.lengths[chosen]),
            labels=None if self.labels is None else _read_only(self.labels[chosen]),
            truncated=_read_only(self.truncated[chosen]),
            origin_numbers=_read_only(self.origin_numbers[chosen]),
            lines=_read_only(self.lines[chosen]),
        )

    def split(
        self, fraction: float, seed: int, members: Bool[np.ndarray, "examples labels"] | None = None
    ) -> "tuple[Examples, Examples]":
        """Returns training and validation examples, both in their original order.

        All examples of one row of a file stay together. At least one row of each label remains for training.
        As far as the fraction allows, the validation rows have each label that at least two rows have. If
        each example has one class, they have the same proportions of classes as far as whole numbers allow.

        Args:
            fraction: the fraction of the rows for validation; at least one row is taken.
            members: whether an example has each of several labels, if it has not one class.

        Raises:
            UserError: the fraction is not between 0 and 1, or there are too few rows.
        """
        if not 0 < fraction < 1:
            raise UserError(
                f"fraction={fraction} of the rows for validation; expected a number between 0 and 1"
            )
        places = self.origin_numbers * (np.max(self.lines, initial=0) + 1) + self.lines
        _, first, row_of = np.unique(places, return_index=True, return_inverse=True)
        order, total = permutation(len(first), seed), max(1, round(fraction * len(first)))
        if members is not None:
            validation = _covering_rows(members[first], order, total)
        else:
            classes = np.zeros(len(first), int)
            if self.labels is not None and self.labels.ndim == 1:
                _, classes = np.unique(self.labels[first], return_inverse=True)
            validation = _stratified_rows(classes, order, fraction, total)
        if not validation.any():
            raise UserError(
                f"none of {len(first)} rows can be used for validation, as each is the last of its class; "
                "add rows, or give a validation file"
            )
        chosen = validation[row_of]
        return self.subset(np.flatnonzero(~chosen)), self.subset(np.flatnonzero(chosen))

    def fingerprint(self) -> str:
        """Returns a digest of the tokens and labels in their order, so that a resumed run can check its data.

        Files and lines do not change it: data may move.
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
                # Consecutive examples are digested together, which is nearly all of them unless shuffled.
                for first, last in zip([0, *gaps], [*(gaps - 1), len(self) - 1], strict=True):
                    digest.update(flat[self.starts[first] : stops[last]].data)
        return digest.hexdigest()

    def _span(self, index: int) -> slice:
        start = self.starts[index]
        return slice(start, start + self.lengths[index])


class _Builder:
    """Collects examples in arrays that grow by a fraction of their size."""

    def __init__(self) -> None:
        self.lengths, self.input_ids, self.token_labels = array("i"), array("i"), array("i")
        self.classes, self.numbers = array("i"), array("f")
        self.firsts, self.truncated = array("b"), array("b")
        self.origins: dict[tuple[str, str], tuple[int, Place]] = {}
        self.origin_numbers, self.lines = array("i"), array("q")
        self.form: tuple[str, int, bool] | None = None

    def add(self, example: Example) -> None:
        ids, labels, firsts, place = example.input_ids, example.labels, example.firsts, example.place
        if not ids:
            raise UserError(f"{place} has no tokens; remove it")
        kind, size = _kind(labels)
        form = kind, size, firsts is not None
        self.form = self.form or form
        if form != self.form:
            raise UserError(f"{place} has {_describe(form)}; earlier examples have {_describe(self.form)}")
        if not isinstance(labels, list):
            self.classes.extend([] if labels is None else [labels])
        elif kind == "numbers":
            self.numbers.extend(labels)
        else:
            _check_size(place, "labels", labels, ids)
            self.token_labels.extend(cast("list[int]", labels))
        if firsts is not None:
            _check_size(place, "marks for first tokens of words", firsts, ids)
            self.firsts.extend(firsts)
        self.input_ids.fromlist(ids)
        self.lengths.append(len(ids))
        self.truncated.append(example.truncated)
        number, _ = self.origins.setdefault((place.file, place.unit), (len(self.origins), place))
        self.origin_numbers.append(number)
        self.lines.append(place.line)

    def build(self) -> Examples:
        kind, size, of_words = self.form or ("none", 0, False)
        lengths = _read_only(np.asarray(self.lengths))
        labels = None
        if kind == "class":
            labels = _read_only(np.asarray(self.classes))
        elif kind == "numbers":
            labels = _read_only(np.asarray(self.numbers).reshape(-1, size))
        return Examples(
            starts=_read_only(np.cumsum(lengths, dtype=np.int64) - lengths),
            lengths=lengths,
            labels=labels,
            truncated=_read_only(np.asarray(self.truncated).view(bool)),
            origins=tuple(place for _, place in self.origins.values()),
            origin_numbers=_read_only(np.asarray(self.origin_numbers)),
            lines=_read_only(np.asarray(self.lines)),
            flat_input_ids=_read_only(np.asarray(self.input_ids)),
            flat_labels=_read_only(np.asarray(self.token_labels)) if kind == "tokens" else None,
            flat_firsts=_read_only(np.asarray(self.firsts).view(bool)) if of_words else None,
        )


def _kind(labels: int | list[float] | list[int] | None) -> tuple[str, int]:
    """Returns what has labels, and how many numbers label a whole example."""
    if labels is None:
        return "none", 0
    if not isinstance(labels, list):
        return "class", 1
    if labels and isinstance(labels[0], float):
        return "numbers", len(labels)
    return "tokens", 0


def _describe(form: tuple[str, int, bool]) -> str:
    kind, size, of_words = form
    labels = {"none": "no labels", "class": "one class", "tokens": "labels for tokens"}
    return labels.get(kind, f"{size} numbers as labels") + (" and marked words" if of_words else "")


def _check_size(place: object, what: str, values: Sequence[float], ids: list[int]) -> None:
    if len(values) != len(ids):
        raise UserError(f"{place} has {len(values)} {what}; expected one for each of its {len(ids)} tokens")


def _stratified_rows(
    classes: Int[np.ndarray, "rows"], order: Int[np.ndarray, "rows"], fraction: float, total: int
) -> Bool[np.ndarray, "rows"]:
    """Chooses up to `total` rows, the first of each class in this order."""
    counts = np.bincount(classes)
    taken = _class_counts(counts, fraction, min(total, int(np.sum(counts - 1))))
    by_class = order[np.argsort(classes[order], kind="stable")]
    rank = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(classes), bool)
    chosen[by_class] = rank < np.repeat(taken, counts)
    return chosen


def _class_counts(counts: np.ndarray, fraction: float, total: int) -> np.ndarray:
    """Divides `total` over the classes.

    Each class with two rows or more gets one, the largest first. More follow their fractions, rounded down,
    then one more where most was lost. At least one of each class is left.
    """
    exact = counts * fraction
    least = np.zeros(len(counts), int)
    least[np.argsort(-counts, kind="stable")[:total]] = 1
    least[counts < 2] = 0
    taken = np.maximum(np.floor(exact).astype(int), least)
    while (missing := total - int(taken.sum())) != 0:
        open_classes = np.flatnonzero(taken < counts - 1 if missing > 0 else taken > least)
        lost = (exact - taken)[open_classes] * np.sign(missing)
        taken[open_classes[np.argsort(-lost, kind="stable")[: abs(missing)]]] += np.sign(missing)
    return taken


def _covering_rows(
    members: Bool[np.ndarray, "rows labels"], order: Int[np.ndarray, "rows"], total: int
) -> Bool[np.ndarray, "rows"]:
    """Chooses up to `total` rows in this order: first those with labels that no chosen row has, rarest first.

    A row is not chosen if it is the last that has one of its labels.
    """
    left = members.sum(axis=0)
    chosen = np.zeros(len(members), bool)
    covered = np.zeros(members.shape[1], bool)

    def choose(rows: Iterable[int], most: int) -> None:
        for row in rows:
            if most <= 0:
                return
            if not chosen[row] and np.all(left[members[row]] > 1):
                chosen[row] = True
                left[members[row]] -= 1
                covered[members[row]] = True
                most -= 1

    for label in np.argsort(left, kind="stable"):
        if not covered[label] and chosen.sum() < total:
            choose(order[members[order, label]], 1)
    choose(order, total - int(chosen.sum()))
    return chosen


def _read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values
