"""Several short examples in one row, for causal language models."""

import hashlib
from itertools import chain

import numpy as np
from jaxtyping import Int

from phi3_jax.data.examples import Examples
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX


def pack(
    lengths: Int[np.ndarray, "examples"], width: int, *, groups: Int[np.ndarray, "examples"] | None = None
) -> list[Int[np.ndarray, "packed"]]:
    """The examples of each row of `width` tokens, with few rows: best fit, the longest example first.

    Args:
        groups: examples of different groups never share a row.

    Raises:
        ValueError: an example longer than `width`, or without tokens.
    """
    lengths = np.asarray(lengths)
    wrong = np.count_nonzero((lengths > width) | (lengths < 1))
    if wrong:
        raise UserError(
            f"{wrong} of {len(lengths)} examples cannot be packed into rows of {width} tokens (lengths are "
            f"{lengths.min()} to {lengths.max()}); expected 1 to {width} tokens"
        )
    if groups is None:
        return _pack(lengths, np.arange(len(lengths)), width)
    groups = np.asarray(groups)
    rows = (_pack(lengths, np.flatnonzero(groups == group), width) for group in np.unique(groups))
    return list(chain.from_iterable(rows))


def _pack(lengths: np.ndarray, members: np.ndarray, width: int) -> list[np.ndarray]:
    members = members[np.argsort(-lengths[members], kind="stable")]
    borders = np.flatnonzero(np.diff(lengths[members])) + 1
    rows: list[list[np.ndarray]] = []
    rows_by_space: dict[int, list[int]] = {}
    # Bit n is set where some row has n tokens left, so the tightest fit is the lowest bit from a length up.
    spaces = 0
    for same in np.split(members, borders) if len(members) else []:
        length = int(lengths[same[0]])
        placed = 0
        while placed < len(same):
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                row = rows_by_space[space].pop()
                if not rows_by_space[space]:
                    spaces ^= 1 << space
            else:
                space, row = width, len(rows)
                rows.append([])
            # A row that took one of this length is now the tightest for the next, until it is full.
            count = min(space // length, len(same) - placed)
            rows[row].append(same[placed : placed + count])
            placed += count
            space -= count * length
            rows_by_space.setdefault(space, []).append(row)
            spaces |= 1 << space
    return [np.concatenate(parts) for parts in rows]


class PackedExamples:
    """Rows of several examples; what an example sees and predicts is as if it stood alone.

    Args:
        examples: with labels of tokens.
        rows: the examples of each row, from `pack`.

    Raises:
        ValueError: examples without labels of tokens.
    """

    labels = None
    """Rows have no labels but those of their tokens."""
    columns = ("input_ids", "labels", "position_ids", "segment_ids")

    def __init__(self, examples: Examples, rows: list[Int[np.ndarray, "packed"]]):
        if examples.flat_labels is None:
            raise UserError(
                "the examples have no labels of tokens; pack those of causal language models only"
            )
        self.examples = examples
        self.rows = rows
        self.lengths = np.array([examples.lengths[row].sum() for row in rows], np.int32)
        """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        """What a batch holds for every token: positions from 0 in each example, segments counted from 1.

        The loss compares a token's label with what is predicted from the token before, which for the first of
        an example belongs to another one: it has no label.
        """
        members = self.rows[index]
        lengths = self.examples.lengths[members]
        starts = np.cumsum(lengths) - lengths
        labels = np.concatenate([self.examples.token_labels(i) for i in members])
        labels[starts] = IGNORE_INDEX
        return {
            "input_ids": np.concatenate([self.examples.input_ids(i) for i in members]),
            "labels": labels,
            "position_ids": (np.arange(len(labels)) - np.repeat(starts, lengths)).astype(np.int32),
            "segment_ids": np.repeat(np.arange(1, len(members) + 1, dtype=np.int32), lengths),
        }

    def place(self, index: int) -> str:
        """Where the row's first example comes from, and how many others there are."""
        first, *others = self.rows[index]
        return self.examples.place(first) + (f" and {len(others)} packed with it" if others else "")

    def fingerprint(self) -> str:
        """A digest of the examples and how they are packed."""
        digest = hashlib.blake2b(self.examples.fingerprint().encode(), digest_size=16)
        for row in self.rows:
            digest.update(np.array([len(row), *row], np.int64).tobytes())
        return digest.hexdigest()
