"""Models of transformers whose layers and key/value heads have rope frequencies of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from answers import stored
from reference import Reference

from phi3_jax import LayerFrequencies, Phi3Config


def unequal_frequencies(
    config: Phi3Config, *, by_head: bool = True, rows: int | None = None
) -> LayerFrequencies:
    """Returns frequencies and factors that differ by layer, and by head and row if wanted."""
    shape = (config.num_hidden_layers, config.num_key_value_heads)[: 1 + by_head]
    shape = shape if rows is None else (rows, *shape)
    draws = np.random.default_rng(len(shape))
    stretch = draws.uniform(0.8, 4.0, (*shape, config.rotary_dim // 2)).astype(np.float32)
    return LayerFrequencies(
        config.rope_base.inv_freq() / stretch, draws.uniform(0.7, 1.4, shape).astype(np.float32)
    )


@contextmanager
def with_layer_ropes(
    model: Any, inv_freq: np.ndarray, scaling: np.ndarray, unscaled: Any = 0, plain: Any = None
) -> Iterator[None]:
    """Gives each layer of a model, at `positions` 0, 1, ..., its own rope.

    Args:
        inv_freq, scaling: [B or 1, L, K or 1, P] and [B or 1, L, K or 1].
        unscaled: the number of first tokens that have the frequencies `plain` [P].
    """
    import torch
    from transformers.models.phi3 import modeling_phi3

    layer = 0

    def rotate_layer(queries: Any, keys: Any, *_: Any) -> tuple[Any, Any]:
        nonlocal layer
        at = torch.arange(keys.shape[2])[None, None, :, None]
        own = torch.tensor(inv_freq)[:, layer, :, None]
        own = own if plain is None else torch.where(at < unscaled, torch.tensor(plain), own)
        angles = at * own  # [B, K, T, P]
        factor = torch.tensor(scaling)[:, layer, :, None, None]
        layer = (layer + 1) % inv_freq.shape[1]
        return rotate(queries, angles, factor), rotate(keys, angles, factor)

    def rotate(x: Any, angles: Any, factor: Any) -> Any:
        pairs = angles.shape[-1]
        groups = x.shape[1] // angles.shape[1]
        cos, sin = ((f(angles) * factor).repeat_interleave(groups, 1) for f in (torch.cos, torch.sin))
        first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    original = modeling_phi3.apply_rotary_pos_emb
    modeling_phi3.apply_rotary_pos_emb = rotate_layer
    try:
        yield
    finally:
        modeling_phi3.apply_rotary_pos_emb = original


@stored
def outputs_of_theirs(
    theirs: Reference, ids: np.ndarray, inv_freq: np.ndarray, scaling: np.ndarray, unscaled: int = 0
) -> dict[str, Any]:
    """Returns the reference's logits, loss and gradients without a cache or padding; shapes as above."""
    import torch

    theirs.model.zero_grad(set_to_none=True)
    with with_layer_ropes(theirs.model, inv_freq, scaling, unscaled, theirs.config.rope_base.inv_freq()):
        out = theirs.model(torch.tensor(ids), labels=torch.tensor(ids), use_cache=False)
    out.loss.backward()
    gradients = {name: each.grad for name, each in theirs.model.named_parameters()}
    losses = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].swapaxes(1, 2), torch.tensor(ids)[:, 1:], reduction="none"
    )
    return {"logits": out.logits, "losses": losses, "loss": out.loss, "gradients": gradients}
