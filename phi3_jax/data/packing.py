"""Packs several short examples into one row, for causal language models."""

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
    """Packs examples into few rows of `width` tokens; returns the examples of each row.

    Best fit decreasing: the longest example first, each into the row with the least sufficient space.

    Args:
        groups: the group of each example; examples of different groups never share a row.

    Raises:
        UserError: an example is longer than `width`, or has no tokens.
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
    # Bit n is set if some row has space for n tokens, so the best fit is the lowest bit from the length up.
    spaces = 0
    for same in np.split(members, borders) if len(members) else []:
        length = int(lengths[same[0]])
        done = 0
        while done < len(same):
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                row = rows_by_space[space].pop()
                if not rows_by_space[space]:
                    spaces ^= 1 << space
            else:
                space, row = width, len(rows)
                rows.append([])
            # This row now is the best fit for the next examples of this length too, until it is full.
            count = min(space // length, len(same) - done)
            rows[row].append(same[done : done + count])
            done += count
            space -= count * length
            rows_by_space.setdefault(space, []).append(row)
            spaces |= 1 << space
    return [np.concatenate(parts) for parts in rows]


class PackedExamples:
    """Rows of several examples; each example attends and predicts as if it were alone.

    Args:
        examples: examples with labels for tokens.
        rows: the examples of each row, from `pack`.

    Raises:
        UserError: the examples have no labels for tokens.
    """

    labels = None
    """Only tokens have labels."""
    columns = ("input_ids", "labels", "position_ids", "segment_ids")

    def __init__(self, examples: Examples, rows: list[Int[np.ndarray, "packed"]]):
        if examples.flat_labels is None:
            raise UserError(
                "the examples have no labels for tokens; pack only examples of causal language models"
            )
        self.examples = examples
        self.rows = rows
        self.lengths = np.array([examples.lengths[row].sum() for row in rows], np.int32)
        """Number of tokens of each row."""

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        """Returns the values of a row per token: positions from 0 in each example, segments from 1.

        The first token of an example has no label: the token before it, which would predict it, belongs to
        another example.
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
        """Returns the place of the row's first example, and the number of others."""
        first, *others = self.rows[index]
        return self.examples.place(first) + (f" and {len(others)} packed with it" if others else "")

    def fingerprint(self) -> str:
        """Returns a digest of the examples and their packing."""
        digest = hashlib.blake2b(self.examples.fingerprint().encode(), digest_size=16)
        for row in self.rows:
            digest.update(np.array([len(row), *row], np.int64).tobytes())
        return digest.hexdigest()
