"""Assigns examples to batches: widths with little padding, and a plan of the batches of each epoch."""

import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.sizes import ceil_div

MIXED_STEPS = 8
"""Steps that share a sample of the examples. More steps pad less, and fewer mix better: with 8 steps of 4
batches, the classes of a step are as mixed as in a sample of its own, even where they differ in length."""


class BatchPlan:
    """The examples of every step of every epoch.

    A step takes one batch or several, each of `rows` examples that are no longer than its width. The plan
    depends only on its arguments, not on the number of processes, and its batches can be read in any order.

    An epoch shuffles the examples. With several ranges a step, each `MIXED_STEPS` steps take the next
    examples, a random sample. The sample is sorted by width and divided into ranges, one for each batch of a
    step or several, and every step gets as many examples of each range. So a step has short and long
    examples, and what comes with their length, such as a class. The last steps of an epoch may have empty
    rows.

    With one range, all examples are sorted into the narrowest widths that hold them, and the batches
    are shuffled. Examples that do not fill a batch of their width start one of the next wider; only the
    widest may have empty rows. Without `shuffle`, every epoch has the examples in order, longest first.

    Args:
        lengths: number of tokens of each example.
        rows: rows of a batch, over all processes.
        widths: widths that batches may have, in tokens.
        step_batches: batches of a step.
        step_ranges: ranges of widths that each step has examples of, a multiple of `step_batches`, which is
            the default. Plans of the same ranges and rows a step have the same examples in each step.
        seed: seeds the shuffles, together with the number of the epoch.

    Raises:
        UserError: there are no examples, or some are longer than the widest width.
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, "examples"],
        *,
        rows: int,
        widths: Sequence[int],
        shuffle: bool,
        step_batches: int = 1,
        step_ranges: int | None = None,
        seed: int = 0,
    ):
        lengths = np.asarray(lengths)
        self.rows, self.step_batches = rows, step_batches
        self.step_ranges = step_ranges or step_batches
        self.widths = tuple(sorted(widths))
        _check(lengths, rows, self.widths)
        self._lengths = lengths
        # NumPy sorts 16-bit integers several times faster than wider ones.
        self._buckets = np.searchsorted(self.widths, lengths).astype(np.int16)
        self._shuffle = shuffle
        self._seed = seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        return ceil_div(len(self._lengths), self.rows * self.step_batches)

    @property
    def batches_per_epoch(self) -> int:
        return self.steps_per_epoch * self.step_batches

    @property
    def padded_tokens(self) -> int:
        """The tokens of the first epoch's batches, padding included."""
        buckets, _ = self._epoch(0)
        return int(np.asarray(self.widths)[buckets].sum()) * self.rows

    def batch(self, number: int) -> tuple[int, Int[np.ndarray, "B"]]:
        """Returns the width and the examples of a batch, counted over all epochs; -1 is an empty row."""
        if number < 0:
            raise IndexError(f"batch {number} does not exist; batches are counted from 0")
        epoch, within = divmod(number, self.batches_per_epoch)
        buckets, indices = self._epoch(epoch if self._shuffle else 0)
        return self.widths[buckets[within]], indices[within]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bucket and the examples of every batch; keeps the last two epochs."""
        with self._lock:  # several loader threads may reach a new epoch at once
            if epoch not in self._epochs:
                while len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = self._plan_epoch(epoch)
            return self._epochs[epoch]

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if not self._shuffle:
            indices = self._batches(np.argsort(-self._lengths, kind="stable"))
        elif self.step_ranges == 1:
            indices = self._batches(self._by_width(permutation(len(self._lengths), self._seed, epoch)))
            indices = indices[permutation(len(indices), self._seed, epoch, 1)]
        else:
            indices = self._mixed_batches(epoch)
        buckets = np.where(indices < 0, 0, self._buckets[indices]).max(axis=1)
        indices.flags.writeable = False
        return buckets, indices

    def _batches(self, order: np.ndarray) -> np.ndarray:
        """Returns the examples of each batch; the last one may have empty rows."""
        indices = np.full((self.batches_per_epoch, self.rows), -1, np.int64)
        indices.flat[: len(order)] = order
        return indices

    def _by_width(self, order: np.ndarray) -> np.ndarray:
        """Sorts examples by width; those of one width keep their order."""
        return order[np.argsort(self._buckets[order], kind="stable")]

    def _mixed_batches(self, epoch: int) -> np.ndarray:
        """Returns the examples of each batch; the batches of a step have examples of different lengths."""
        order = permutation(len(self._lengths), self._seed, epoch)
        rows = self.rows * self.step_batches // self.step_ranges
        indices = np.full((self.steps_per_epoch, self.step_ranges, rows), -1, np.int64)
        for first in range(0, len(indices), MIXED_STEPS):
            sample = indices[first : first + MIXED_STEPS]
            start = first * self.step_batches * self.rows
            taken = self._by_width(order[start : start + sample.size])
            ranges = np.full(sample.size, -1, np.int64)
            ranges[sample.size - len(taken) :] = taken  # empty rows count as the shortest
            for number, own in enumerate(ranges.reshape(self.step_ranges, len(sample), rows)):
                sample[:, number] = own[permutation(len(sample), self._seed, epoch, 1, first, number)]
        return indices.reshape(self.batches_per_epoch, self.rows)


def _check(lengths: np.ndarray, rows: int, widths: tuple[int, ...]) -> None:
    if not len(lengths):
        raise UserError("there are no examples to make batches of")
    if rows < 1 or not widths:
        raise UserError(f"rows={rows} and widths={list(widths)}; expected at least one row and one width")
    too_long = np.count_nonzero(lengths > widths[-1])
    if too_long:
        raise UserError(
            f"{too_long} of {len(lengths)} examples are longer than the widest batch, {widths[-1]} tokens "
            f"(the longest has {lengths.max()}); truncate them, or add a width"
        )


def permutation(count: int, *seed: int) -> Int[np.ndarray, "count"]:
    """Returns the numbers below `count`, shuffled the same way by every version of NumPy.

    NumPy guarantees that its bit generators do not change, but not its shuffles.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def bucket_widths(
    lengths: Int[np.ndarray, "examples"], *, most: int = 8, multiple: int = 8
) -> tuple[int, ...]:
    """Returns up to `most` widths, all multiples of `multiple`, that need the least padding.

    Each example takes the narrowest width that holds it; the last holds the longest example.
    """
    if not len(lengths):
        raise UserError("there are no examples to choose widths for")
    # Candidates are the lengths rounded up: a width between two of them would only add padding.
    needed, counts = np.unique(-(-np.asarray(lengths, np.int64) // multiple), return_counts=True)
    ends = needed * multiple
    before = np.concatenate([[0], np.cumsum(counts)])
    # tokens[j]: padded tokens of the examples up to candidate j, with one more width in every round.
    tokens = np.full(len(ends) + 1, np.inf)
    tokens[0] = 0
    rounds = []
    for _ in range(min(most, len(ends))):
        fewer, tokens = tokens, np.full_like(tokens, np.inf)
        previous = np.zeros(len(tokens), int)
        for j in range(1, len(tokens)):
            totals = fewer[:j] + ends[j - 1] * (before[j] - before[:j])
            previous[j] = np.argmin(totals)
            tokens[j] = totals[previous[j]]
        rounds.append(previous)
    widths = []
    j = len(ends)
    for previous in reversed(rounds):
        widths.append(int(ends[j - 1]))
        j = previous[j]
    return tuple(reversed(widths))
