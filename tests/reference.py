"""Small random models of transformers and their twins here, and how far two arrays are apart."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import phi3_jax
from phi3_jax import Phi3Config
from phi3_jax.model.abstract import abstract_model

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


def on_mesh(model: Any, mesh: Any) -> Any:
    """A model with the same weights, divided over `mesh`."""
    config, dtype = model.config, model.dtype
    leaves, structure = jax.tree.flatten(abstract_model(type(model), config, dtype=dtype, mesh=mesh))
    weights = [
        jax.device_put(np.asarray(weight), leaf.sharding)
        for weight, leaf in zip(jax.tree.leaves(model), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, weights)


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
    theirs = (
        theirs.detach().float().numpy().astype(np.float64) if torch.is_tensor(theirs) else np.asarray(theirs)
    )
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    where = np.broadcast_to(where, theirs.shape)
    scale = np.abs(theirs[where]).max()
    return float(np.abs(ours - theirs)[where].max() / (scale if scale > 0 else 1.0))


def run(model: Any, **arguments: Any) -> Any:
    """`model(**arguments)` under `jit`, compiled once for each config and set of shapes."""
    return _run(model, *_told_apart(arguments))


def gradients(model: Any, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The output, and the loss's gradient for each parameter, named and laid out as in the checkpoint."""
    from phi3_jax.checkpoint.save import ModelSource

    out, gradient = _gradients(model, *_told_apart(arguments))
    source = ModelSource(gradient)
    return out, {name: source.read(name) for name in source.names()}


def run_theirs(model: Any, ids: np.ndarray | None, mask: np.ndarray, **arguments: Any) -> Any:
    """The reference's output, with positions counted along the mask and without a cache."""
    if "position_ids" not in arguments:
        arguments["position_ids"] = torch.tensor(positions(mask))
    ids = None if ids is None else torch.tensor(ids)
    return model(ids, attention_mask=torch.tensor(mask), use_cache=False, **arguments)


def alone(theirs: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits that the reference gives the tokens of each row by themselves, put where the row has them."""
    logits = np.zeros((*ids.shape, theirs.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, used in enumerate(mask.astype(bool)):
            logits[row, used] = theirs(torch.tensor(ids[row][used])[None], use_cache=False).logits[0].numpy()
    return logits


def assert_same_gradients(ours: dict[str, np.ndarray], theirs: Any, tolerance: float) -> None:
    """Every parameter of `theirs` has a gradient, and it is ours."""
    others = dict(theirs.named_parameters())
    assert ours.keys() == others.keys()
    for name, parameter in others.items():
        assert distance(ours[name], parameter.grad) <= tolerance, name


def _told_apart(arguments: dict[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """What is traced, and what a compilation is specific to."""
    static = bool | int | np.integer | None
    fixed = {name: value for name, value in arguments.items() if isinstance(value, static)}
    traced = {name: value for name, value in arguments.items() if name not in fixed}
    return traced, tuple(sorted(fixed.items()))


@partial(jax.jit, static_argnames="fixed")
def _run(model: Any, traced: dict[str, Any], fixed: tuple[tuple[str, Any], ...]) -> Any:
    return model(**traced, **dict(fixed))


@partial(jax.jit, static_argnames="fixed")
def _gradients(model: Any, traced: dict[str, Any], fixed: tuple[tuple[str, Any], ...]) -> Any:
    def loss(model: Any) -> Any:
        out = model(**traced, **dict(fixed))
        return out.loss, out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    return out, gradient
