"""Small random models of transformers, our models with the same weights, and the distance of two arrays."""

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

HALF_ROTARY = {"short_factor": [1.0, 1.2, 1.9], "long_factor": [1.5, 3.0, 9.0]}
"""The same for 6 rotary dims."""

GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12}
"""Config changes for heads that a mesh of eight devices can divide."""


def small_config(**changes: Any) -> Phi3Config:
    """Returns a config of two layers, with 4 query heads on 2 key/value heads of 12 dims.

    The weights are large enough for every layer to matter.
    """
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


def small_vocabulary_config(**changes: Any) -> Phi3Config:
    """Returns a `small_config` of 32 tokens, for tests that store all logits of the reference."""
    return small_config(**({"vocab_size": 32} | changes))


def longrope(original: int = 16, **changes: Any) -> dict[str, Any]:
    """Returns config changes for longrope with an original window of `original` tokens, of 64."""
    return {
        "original_max_position_embeddings": original,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG} | changes,
    }


class Reference:
    """A random model of transformers in float32 with eager attention, loaded on first use."""

    def __init__(self, kind: str, config: Phi3Config, folder: Path, seed: int = 0):
        self.config, self.folder = config, folder
        self._class = CLASSES[kind][1].for_config(config).__name__
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
    """Writes a checkpoint in Hugging Face's layout, with the same random weights on every machine."""
    source = ModelSource(abstract_model(CLASSES[kind][1], config))
    tensors = {}
    for name in source.names():
        rng = np.random.default_rng([seed, crc32(name.encode())])
        values = rng.normal(size=source.shape(name))
        if name.endswith("bias"):
            values *= 0.3
        elif "norm" in name:
            values = 1.0 + 0.3 * values
        else:
            values *= config.initializer_range
        if ("embed_tokens" in name or "lm_head" in name) and config.pad_token_id is not None:
            values[config.pad_token_id] = 0.0  # as the reference begins; no greedy answer holds padding
        tensors[name] = values.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    architecture = CLASSES[kind][1].for_config(config).__name__
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **config.to_dict()}))


def pair(kind: str, config: Phi3Config, folder: Path, seed: int = 0) -> tuple[Any, Reference]:
    """Returns our model with random weights, and the reference's with the same weights."""
    write_random_model(kind, config, folder, seed)
    return CLASSES[kind][1].from_pretrained(folder), Reference(kind, config, folder, seed)


def on_mesh(model: Any, mesh: Any) -> Any:
    """Returns a model with the same weights, divided over `mesh`."""
    config, dtype = model.config, model.dtype
    leaves, structure = jax.tree.flatten(abstract_model(type(model), config, dtype=dtype, mesh=mesh))
    weights = [
        jax.device_put(np.asarray(weight), leaf.sharding)
        for weight, leaf in zip(jax.tree.leaves(model), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, weights)


def padding_mask(batch: int, length: int, side: str) -> np.ndarray:
    """Returns a mask of rows with different lengths, padded on `side`; "none" is a mask of ones."""
    mask = np.ones((batch, length), np.int64)
    if side != "none":
        for row in range(1, batch):
            padding = slice(0, 3 * row) if side == "left" else slice(length - 3 * row, length)
            mask[row, padding] = 0
    return mask


def positions(mask: np.ndarray) -> np.ndarray:
    """Returns positions counted along the mask, as transformers' generate counts them."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def random_ids(config: Phi3Config, mask: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns random ids without special tokens, and the padding token where the mask is 0."""
    ids = np.random.default_rng(seed).integers(4, config.vocab_size, mask.shape)
    return np.where(mask == 1, ids, config.pad_token_id)


def distance(ours: Any, theirs: Any, where: Any = True) -> float:
    """Returns the largest difference over the largest value of `theirs`, among the elements in `where`.

    If `theirs` is a `Sample`, only its elements are compared.
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
    """Returns `model(**arguments)` under `jit`, compiled once for each config and set of shapes."""
    return _run(model, *_split_static(arguments))


def gradients(model: Any, **arguments: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the output, and the gradients of the loss, named and laid out as in the checkpoint."""
    out, gradient = _gradients(model, *_split_static(arguments))
    source = ModelSource(gradient)
    return out, {name: source.read(name) for name in source.names()}


def run_theirs(theirs: Reference, ids: np.ndarray | None, mask: np.ndarray | None, **arguments: Any) -> Any:
    """Returns the reference's output without a cache; positions are counted along the mask if not given.

    `gradients=True` adds `gradients`, those of the loss by the parameters' names.
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
    """Returns the reference's logits of each row without its padding, at the row's tokens; 0 elsewhere."""
    import torch

    logits = np.zeros((*ids.shape, theirs.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, used in enumerate(mask.astype(bool)):
            out = theirs.model(torch.tensor(ids[row][used])[None], use_cache=False)
            logits[row, used] = out.logits[0].numpy()
    return logits


def assert_same_gradients(ours: dict[str, np.ndarray], theirs: Any, tolerance: float) -> None:
    """Checks that we have the gradients of the reference's output `theirs`, and no others."""
    assert ours.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert distance(ours[name], gradient) <= tolerance, name


def assert_same_leaves(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Checks that the arrays of two pytrees have at most a `distance` of `tolerance`."""
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert distance(mine, other) <= tolerance


def _split_static(arguments: dict[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Returns the arguments that are traced, and the static ones."""
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
