"""Pairs of a model of transformers and ours with the same weights, which generate from the same prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from answers import Sample, stored
from reference import Reference, pair

from phi3_jax import Phi3Config

PAD = 3
CONTEXT = {"max_position_embeddings": 512, "original_max_position_embeddings": 512}


class Twins:
    """A model of ours and the reference's; they have no end tokens unless a call names some."""

    def __init__(self, config: Phi3Config, folder: Path, seed: int = 0):
        self.config = config
        self.model, self.reference = pair("causal", config, folder, seed)

    def ours(self, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any) -> Any:
        """Returns our ids as NumPy, or the whole output with `return_dict_in_generate`."""
        out = self.model.generate(ids, mask, **{"eos_token_id": [], "pad_token_id": PAD} | options)
        return out if hasattr(out, "sequences") else np.asarray(out)

    def theirs(self, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any) -> Any:
        """Returns the reference's ids, or its whole output as a namespace."""
        return _namespace(_generate(self.reference, ids, mask, **options))

    def sampled(self, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any) -> Any:
        """Does what `theirs` does; stored answers have a `Sample` of each large array."""
        return _namespace(_generate_sampled(self.reference, ids, mask, **options))

    def same(self, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any) -> np.ndarray:
        """Checks that both return the same ids, and returns them."""
        expected = self.theirs(ids, mask, **options)
        np.testing.assert_array_equal(self.ours(ids, mask, **options), expected)
        return expected


def ask(reference: Reference, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any) -> Any:
    """Returns the reference's ids, or the arrays of its whole output by name.

    Processors and criteria in the options are functions of NumPy arrays; an empty list means no end token.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

    class Processor(LogitsProcessor):
        def __init__(self, rule: Callable[..., Any]):
            self.rule = rule

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.tensor(self.rule(input_ids.numpy(), scores.numpy().copy()))

    def criterion(rule: Callable[..., Any]) -> Any:
        return lambda ids, scores, **_: torch.tensor(rule(ids.numpy(), scores))

    options = {"eos_token_id": None, "pad_token_id": PAD, "do_sample": False} | options
    options["eos_token_id"] = options["eos_token_id"] or None
    if rules := options.pop("logits_processor", None):
        options["logits_processor"] = LogitsProcessorList(map(Processor, rules))
    if rules := options.pop("stopping_criteria", None):
        options["stopping_criteria"] = StoppingCriteriaList(map(criterion, rules))
    options = {
        name: torch.tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    torch.manual_seed(0)  # no test uses sampled tokens, but they are stored with the rest
    reference.model.generation_config.eos_token_id = None
    ids, mask = (None if x is None else torch.tensor(x) for x in (ids, mask))
    out = reference.model.generate(ids, attention_mask=mask, **options)
    if not hasattr(out, "sequences"):
        return out
    return {name: value for name, value in out.items() if name != "past_key_values"}


@stored(whole=True)
def _generate(reference: Reference, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any) -> Any:
    return ask(reference, ids, mask, **options)


@stored
def _generate_sampled(
    reference: Reference, ids: np.ndarray | None, mask: np.ndarray | None, **options: Any
) -> Any:
    return ask(reference, ids, mask, **options)


def _namespace(answer: Any) -> Any:
    return SimpleNamespace(**answer) if isinstance(answer, dict) else answer


def named(function: Callable[..., Any], *settings: Any) -> Callable[..., Any]:
    """Returns the function, which stored answers identify by its name and its `settings`."""
    function.answer_key = (function.__name__, *settings)  # type: ignore[attr-defined]
    return function


def beside(theirs: Any, *ours: Any) -> tuple[np.ndarray, ...]:
    """Returns the elements of `theirs`, and the same elements of each of `ours`, which broadcast to it."""
    if isinstance(theirs, Sample):
        return theirs.values, *map(theirs.at, ours)
    return np.asarray(theirs), *(np.broadcast_to(np.asarray(each), np.shape(theirs)) for each in ours)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities along the last axis, in float64."""
    likely = np.exp(np.float64(logits) - logits.max(axis=-1, keepdims=True))
    return likely / likely.sum(axis=-1, keepdims=True)


def prompts(lengths: Sequence[int], side: str = "left", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns random prompts of these lengths, padded on `side`, and their mask."""
    rng, width = np.random.default_rng([seed, *lengths]), max(lengths)
    ids, mask = np.full((len(lengths), width), PAD), np.zeros((len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        used = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, used] = rng.integers(4, 96, length)
        mask[row, used] = 1
    return ids, mask
