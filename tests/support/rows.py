"""Helpers for batches by row: prompts, our answers, and the reference's answers to each row alone."""

from typing import Any

import numpy as np
from answers import stored
from reference import Reference
from twins import Twins


def rows_of(ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Returns each row's tokens without padding."""
    return [row[used] for row, used in zip(ids, mask.astype(bool), strict=True)]


def alone(twins: Twins, ids: np.ndarray, mask: np.ndarray, count: int, **options: Any) -> np.ndarray:
    """Returns the reference's `count` new tokens of each row alone."""
    new = [
        twins.theirs(row[None], np.ones_like(row)[None], max_new_tokens=count, **options)[0, len(row) :]
        for row in rows_of(ids, mask)
    ]
    return np.stack(new)


def answers(twins: Twins, ids: np.ndarray, mask: np.ndarray, count: int, **options: Any) -> np.ndarray:
    """Returns our new tokens for the whole batch."""
    return twins.ours(ids, mask, max_new_tokens=count, **options)[:, ids.shape[1] :]


def assert_varied(new: np.ndarray) -> None:
    """Checks that no row repeats few tokens, as such rows would agree with too many wrong answers."""
    assert min(len(set(row)) for row in new.tolist()) > 5


@stored
def logits_along(reference: Reference, tokens: np.ndarray, start: int) -> np.ndarray:
    """Returns the reference's logits after each prefix of a row from `start` tokens on.

    Two forwards without a cache: up to `original_max_position_embeddings`, and over the whole row.
    """
    import torch

    original = reference.config.original_max_position_embeddings
    with torch.no_grad():
        logits = [
            reference.model(torch.tensor(part)[None], use_cache=False).logits[0].numpy()
            for part in (tokens[:original], tokens)
        ]
    return np.concatenate([logits[0], logits[1][original:]])[start - 1 : -1]
