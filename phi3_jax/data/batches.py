"""Which examples stand in which step: widths that make little padding, and epochs cut into batches."""

import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError


class BatchPlan:
    """Steps over all epochs, each a batch of `rows` examples as long as its width or shorter.

    It depends on the arguments alone, not on how many processes there are, and any step can be asked for.
    An epoch is a permutation in which each example moves to the narrowest width that holds it; what fills no
    batch of its width begins one of the next wider, and only the widest may lack rows. Then the batches are
    shuffled. Without `shuffle` every epoch runs once through the examples, longest first.

    Args:
        lengths: tokens of each example.
        rows: of every batch, over all processes.
        widths: that batches may have, in tokens.
        seed: of the permutations, together with the number of the epoch.

    Raises:
        ValueError: there are no examples, or some are longer than the last width.
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, "examples"],
        *,
        rows: int,
        widths: Sequence[int],
        shuffle: bool,
        seed: int = 0,
    ):
        lengths = np.asarray(lengths)
        self.rows = rows
        self.widths = tuple(sorted(widths))
        _check(lengths, rows, self.widths)
        self._lengths = lengths
        # Of 16 bits, which numpy sorts several times faster than wider ones.
        self._buckets = np.searchsorted(self.widths, lengths).astype(np.int16)
        self._shuffle = shuffle
        self._seed = seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._lengths) // self.rows)

    def step(self, number: int) -> tuple[int, Int[np.ndarray, "B"]]:
        """Width and examples of a step counted over all epochs; -1 stands for a row without an example."""
        if number < 0:
            raise IndexError(f"step {number} does not exist; steps are counted from 0")
        epoch, within = divmod(number, self.steps_per_epoch)
        buckets, indices = self._epoch(epoch if self._shuffle else 0)
        return self.widths[buckets[within]], indices[within]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Width's number and examples of every step; the last two epochs asked for are kept."""
        with self._lock:  # threads that make batches ahead may all come to a new epoch at once
            if epoch not in self._epochs:
                while len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = self._cut(epoch)
            return self._epochs[epoch]

    def _cut(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._shuffle:
            order = permutation(len(self._lengths), self._seed, epoch)
            order = order[np.argsort(self._buckets[order], kind="stable")]
        else:
            order = np.argsort(-self._lengths, kind="stable")
        indices = np.full((self.steps_per_epoch, self.rows), -1, np.int64)
        indices.flat[: len(order)] = order
        buckets = np.where(indices < 0, 0, self._buckets[indices]).max(axis=1)
        if self._shuffle:
            turn = permutation(len(indices), self._seed, epoch, 1)
            indices, buckets = indices[turn], buckets[turn]
        indices.flags.writeable = False
        return buckets, indices


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
    """The numbers below `count` in an order that only the seed decides, whatever numpy's version.

    numpy promises that its bit generators never change, but not so its shuffles.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def bucket_widths(
    lengths: Int[np.ndarray, "examples"], *, most: int = 8, multiple: int = 8
) -> tuple[int, ...]:
    """The `most` multiples of `multiple`, or fewer, with the least padding when each example takes the
    narrowest that holds it; the last holds the longest.
    """
    if not len(lengths):
        raise UserError("there are no examples to choose widths for")
    # Only multiples that some example needs: any other could be the next narrower one of these.
    needed, counts = np.unique(-(-np.asarray(lengths, np.int64) // multiple), return_counts=True)
    ends = needed * multiple
    before = np.concatenate([[0], np.cumsum(counts)])
    # tokens[j]: of the examples that the first j candidates hold, with as many widths as rounds so far.
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
