"""Small random models of transformers and their twins here, and how far two arrays are apart."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import phi3_jax
from phi3_jax import Phi3Config

CLASSES = {
    "causal": ("Phi3ForCausalLM", phi3_jax.Phi3ForCausalLM),
    "sequence": ("Phi3ForSequenceClassification", phi3_jax.Phi3ForSequenceClassification),
    "token": ("Phi3ForTokenClassification", phi3_jax.Phi3ForTokenClassification),
    "base": ("Phi3Model", phi3_jax.Phi3Model),
}

SHORT = [1.0, 1.05, 1.3, 1.55, 1.9, 2.4]
LONG = [1.1, 1.6, 3.2, 7.5, 19.0, 41.5]
"""Unequal factor lists for 12 rotary dims."""


def small_config(**changes: Any) -> Phi3Config:
    """Three layers, 4 query heads on 2 key/value heads of 12 dims; weights large enough to matter."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return Phi3Config(**(settings | changes))


def longrope(**changes: Any) -> dict[str, Any]:
    """Config changes for longrope with `orig` = 16 and a stretch of 4."""
    return {
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG} | changes,
    }


def pair(kind: str, config: Phi3Config, folder: Path, seed: int = 0) -> tuple[Any, Any]:
    """A random transformers model in float32 with eager attention, and ours loaded from what it saved."""
    theirs_name, ours_class = CLASSES[kind]
    torch.manual_seed(seed)
    theirs_config = transformers.Phi3Config(**config.to_dict())
    theirs_config._attn_implementation = "eager"
    theirs = getattr(transformers, theirs_name)(theirs_config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return ours_class.from_pretrained(folder), theirs


def padding_mask(batch: int, length: int, side: str) -> np.ndarray:
    """Rows of different lengths padded on `side`; `none` is a mask of ones."""
    mask = np.ones((batch, length), np.int64)
    if side != "none":
        for row in range(1, batch):
            columns = slice(0, 3 * row) if side == "left" else slice(length - 3 * row, length)
            mask[row, columns] = 0
    return mask


def positions(mask: np.ndarray) -> np.ndarray:
    """Positions counted along the mask, as transformers' generate does."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def random_ids(config: Phi3Config, mask: np.ndarray, seed: int = 0) -> np.ndarray:
    """Token ids that are never special, and the padding token where the mask is 0."""
    ids = np.random.default_rng(seed).integers(4, config.vocab_size, mask.shape)
    return np.where(mask == 1, ids, config.pad_token_id)


def distance(ours: Any, theirs: Any, where: Any = True) -> float:
    """Largest difference over largest value of `theirs`, at the elements that `where` selects."""
    ours = np.asarray(ours, np.float64)
    theirs = theirs.detach().float().numpy().astype(np.float64) if torch.is_tensor(theirs) else np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    where = np.broadcast_to(where, theirs.shape)
    scale = np.abs(theirs[where]).max()
    return float(np.abs(ours - theirs)[where].max() / (scale if scale > 0 else 1.0))


def gradients(loss: Any, model: Any) -> dict[str, np.ndarray]:
    """The gradient of `loss(model)` for every parameter, under the checkpoint's names and in its layout."""
    from phi3_jax.checkpoint.save import ModelSource

    source = ModelSource(jax.jit(jax.grad(loss))(model))
    return {name: source.read(name) for name in source.names()}
