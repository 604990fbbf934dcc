"""Small random models of transformers and their twins here, and how far two arrays are apart."""

import json
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import jax
import numpy as np
from answers import Sample, stored
from safetensors.numpy import save_file

import phi3_jax
from phi3_jax import Phi3Config
from phi3_jax.model.abstract import abstract_model
from phi3_jax.model.saving import ModelSource

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
    """Two layers, 4 query heads on 2 key/value heads of 12 dims; weights large enough to matter."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
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


class Reference:
    """A random model of transformers in float32 with eager attention, loaded when it is first asked."""

    def __init__(self, kind: str, config: Phi3Config, folder: Path, seed: int = 0):
        self.config, self.folder = config, folder
        self._class = CLASSES[kind][0]
        self.answer_key = ("weights", WEIGHTS, self._class, config.to_dict(), seed)

    @cached_property
    def model(self) -> Any:
        import torch
        import transformers

        torch.set_num_threads(1)  # small models are several times faster than on two that wait for each other
        model, notes = getattr(transformers, self._class).from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not notes[kind], f"{kind}: {notes[kind]}"
        return model.eval()


WEIGHTS = 2
"""The version of `write_random_model`."""


def write_random_model(kind: str, config: Phi3Config, folder: Path, seed: int = 0) -> None:
    """A checkpoint in Hugging Face's layout, from NumPy's generator: the same everywhere."""
    source = ModelSource(abstract_model(CLASSES[kind][1], config))
    tensors = {}
    for name in source.names():
        rng = np.random.default_rng([seed, crc32(name.encode())])
        values = rng.normal(size=source.shape(name))
        if "norm" in name:
            values = 1.0 + 0.3 * values
        elif name.endswith("bias"):
            values *= 0.3
        else:
            values *= config.initializer_range
        if ("embed_tokens" in name or "lm_head" in name) and config.pad_token_id is not None:
            values[config.pad_token_id] = 0.0  # as the reference begins; no greedy answer holds padding
        tensors[name] = values.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": [CLASSES[kind][0]], **config.to_dict()}))


def pair(kind: str, config: Phi3Config, folder: Path, seed: int = 0) -> tuple[Any, Reference]:
    """Our model with random weights, and the reference's with the same."""
    write_random_model(kind, config, folder, seed)
    return CLASSES[kind][1].from_pretrained(folder), Reference(kind, config, folder, seed)


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
    """Largest difference over largest value of `theirs`, at the elements that `where` selects.

    Of a `Sample` only its elements count.
    """
    ours = np.asarray(ours, np.float64)
    assert ours.shape == np.shape(theirs), f"{ours.shape} against {np.shape(theirs)}"
    if isinstance(theirs, Sample):
        ours, where, theirs = theirs.at(ours), theirs.at(where), theirs.values
    theirs = np.asarray(theirs, np.float64)
    where = np.broadcast_to(where, theirs.shape)
    scale = np.abs(theirs[where]).max()
    return float(np.abs(ours - theirs)[where].max() / (scale if scale > 0 else 1.0))


def run(model: Any, **arguments: Any) -> Any:
    """`model(**arguments)` under `jit`, compiled once for each config and set of shapes."""
    return _run(model, *_told_apart(arguments))


def gradients(model: Any, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The output, and the loss's gradient for each parameter, named and laid out as in the checkpoint."""
    out, gradient = _gradients(model, *_told_apart(arguments))
    source = ModelSource(gradient)
    return out, {name: source.read(name) for name in source.names()}


def run_theirs(theirs: Reference, ids: np.ndarray | None, mask: np.ndarray | None, **arguments: Any) -> Any:
    """The reference's output without a cache, with positions counted along the mask unless some are given.

    With `gradients=True` its `gradients` are the loss's, by the parameters' names.
    """
    if "position_ids" not in arguments and mask is not None:
        arguments["position_ids"] = positions(mask)
    return SimpleNamespace(**_forward(theirs, ids, mask, **arguments))


@stored
def _forward(
    theirs: Reference,
    ids: np.ndarray | None,
    mask: np.ndarray | None,
    gradients: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    import torch

    def tensor(value: Any) -> Any:
        return torch.tensor(value) if isinstance(value, np.ndarray) else value

    model = theirs.model
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(gradients):
        out = model(
            tensor(ids),
            attention_mask=tensor(mask),
            use_cache=False,
            **{name: tensor(value) for name, value in arguments.items()},
        )
    answer = dict(out)
    if gradients:
        out.loss.backward()
        answer["gradients"] = {name: each.grad for name, each in model.named_parameters()}
    return answer


@stored(whole=True)
def alone(theirs: Reference, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits that the reference gives the tokens of each row by themselves, put where the row has them."""
    import torch

    logits = np.zeros((*ids.shape, theirs.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, used in enumerate(mask.astype(bool)):
            out = theirs.model(torch.tensor(ids[row][used])[None], use_cache=False)
            logits[row, used] = out.logits[0].numpy()
    return logits


def assert_same_gradients(ours: dict[str, np.ndarray], theirs: Any, tolerance: float) -> None:
    """Every parameter of `theirs`, a reference's answer, has a gradient, and it is ours."""
    assert ours.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert distance(ours[name], gradient) <= tolerance, name


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
