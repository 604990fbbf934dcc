"""A model of transformers and ours with the same weights, generating from the same prompts."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from answers import stored
from reference import Reference, pair

from phi3_jax import Phi3Config

PAD = 3
CONTEXT = {"max_position_embeddings": 512, "original_max_position_embeddings": 512}


class Twins:
    """`ours` and `theirs`, without end tokens unless a call names some."""

    def __init__(self, config: Phi3Config, folder: Path, seed: int = 0):
        self.config = config
        self.model, self.reference = pair("causal", config, folder, seed)

    def ours(self, ids: np.ndarray, mask: np.ndarray | None, **options: Any) -> Any:
        """Our answer: ids as NumPy, or the whole output where `return_dict_in_generate` asks for it."""
        out = self.model.generate(ids, mask, **{"eos_token_id": [], "pad_token_id": PAD} | options)
        return out if hasattr(out, "sequences") else np.asarray(out)

    def theirs(self, ids: np.ndarray, mask: np.ndarray | None, **options: Any) -> Any:
        """The reference's, whose word for "no end token" is None; of a whole output its arrays."""
        options = {"eos_token_id": None, "pad_token_id": PAD, "do_sample": False} | options
        options["eos_token_id"] = options["eos_token_id"] or None
        answer = _generate(self.reference, ids, mask, **options)
        return SimpleNamespace(**answer) if isinstance(answer, dict) else answer

    def same(self, ids: np.ndarray, mask: np.ndarray | None, **options: Any) -> np.ndarray:
        """What both answer, which must be the same ids."""
        expected = self.theirs(ids, mask, **options)
        np.testing.assert_array_equal(self.ours(ids, mask, **options), expected)
        return expected


@stored(whole=True)
def _generate(reference: Reference, ids: np.ndarray, mask: np.ndarray | None, **options: Any) -> Any:
    import torch

    reference.model.generation_config.eos_token_id = None
    mask = None if mask is None else torch.tensor(mask)
    out = reference.model.generate(torch.tensor(ids), attention_mask=mask, **options)
    if not hasattr(out, "sequences"):
        return out
    return {name: value for name, value in out.items() if name != "past_key_values"}


def prompts(lengths: Sequence[int], side: str = "left", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of those lengths, padded on `side`, and their mask."""
    rng, width = np.random.default_rng([seed, *lengths]), max(lengths)
    ids, mask = np.full((len(lengths), width), PAD), np.zeros((len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        held = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, held] = rng.integers(4, 96, length)
        mask[row, held] = 1
    return ids, mask
