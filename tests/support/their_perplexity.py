"""Perplexity by the method of transformers' documentation, run with transformers under any rope."""

from typing import Any

import numpy as np
from answers import stored
from reference import Reference

from phi3_jax import Phi3Config
from phi3_jax.evaluation.scorer import frequencies_for


def recipe(model: Any, ids: np.ndarray, spans: list[tuple[int, int]], ropes: list[Any]) -> tuple[float, int]:
    """Follows huggingface.co/docs/transformers/perplexity, with the frequencies of each window (`spans`).

    It adds losses, where that page multiplies a mean by a count that is one too few after the first window.
    """
    import torch

    total, count, previous = 0.0, 0, 0
    encodings = torch.tensor(ids)[None]
    for (begin, end), (inv_freq, scaling) in zip(spans, ropes, strict=True):
        input_ids = encodings[:, begin:end]
        targets = input_ids.clone()
        targets[:, : -(end - previous)] = -100
        patch(model, torch.tensor(inv_freq), scaling)
        with torch.no_grad():
            logits = model(input_ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), targets[0, 1:], reduction="none")
        total += float(losses.sum())
        count += int((targets[0, 1:] != -100).sum())
        previous = end
    return total, count


def patch(model: Any, inv_freq: Any, scaling: float) -> None:
    """Sets the rope of a model of transformers."""
    import torch

    def forward(x: Any, position_ids: Any) -> Any:
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * scaling, angles.sin() * scaling

    model.model.rotary_emb.forward = forward


def slide(count: int, length: int, stride: int, frequencies: Any) -> tuple[list[tuple[int, int]], list[Any]]:
    """Returns the windows of that page, with the frequencies and attention factor of each."""
    spans: list[tuple[int, int]] = []
    for begin in range(0, count, stride):
        spans.append((begin, min(begin + length, count)))
        if spans[-1][1] == count:
            break
    ropes = [frequencies(end - begin) for begin, end in spans]
    return spans, [(np.asarray(inv_freq), float(scaling)) for inv_freq, scaling in ropes]


@stored
def perplexity_of_theirs(
    theirs: Reference, ids: np.ndarray, length: int, stride: int, rope: Any
) -> tuple[float, int]:
    """Returns the loss of a text and its tokens by the page's method, with the rope of `rope.config`."""
    windows = slide(len(ids), length, stride, lambda window: frequencies_for(rope.config, window))
    return recipe(theirs.model, ids, *windows)


class Rope:
    """A config for its frequencies; the rope is its key among stored answers."""

    def __init__(self, config: Phi3Config):
        self.config = config
        self.answer_key = (config.rope_parameters, config.original_max_position_embeddings)
