"""Ropes of every type on a small model, and their frequencies on both sides of the switch of lists."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax import Phi3Config

HEAD_DIM, ORIGINAL, CONTEXT = 32, 256, 1024
LENGTHS = [1, ORIGINAL, ORIGINAL + 1, CONTEXT, 2 * CONTEXT]
LISTS = {
    "short_factor": [round(1 + 0.013 * i * i, 4) for i in range(HEAD_DIM // 2)],
    "long_factor": [round(1.08 + 0.21 * i * i, 4) for i in range(HEAD_DIM // 2)],
}
YARN = {"rope_type": "yarn", "factor": 4.0}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": YARN,
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-betas": {**YARN, "beta_fast": 12.5, "beta_slow": 2},
    "yarn-beta-fast": {**YARN, "beta_fast": 8},
    "yarn-untruncated": {**YARN, "truncate": False},
    "longrope": {"rope_type": "longrope", **LISTS},
    "longrope-factor": {"rope_type": "longrope", **LISTS, "factor": 16.0},
    "longrope-attention-factor": {"rope_type": "longrope", **LISTS, "attention_factor": 1.3},
    "longrope-mscales": {"rope_type": "longrope", **LISTS, "short_mscale": 1.1, "long_mscale": 1.4},
    "phi3-yarn": {"rope_type": "phi3-yarn", **LISTS},
    "phi3small": {"rope_type": "phi3small", **LISTS},
}
TWO_ATTENTION_FACTORS = ("longrope-mscales", "phi3small")


def rope_config(name: str, **changes: Any) -> Phi3Config:
    """Returns the config of a small model, with theta and lengths that are no defaults."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 4 * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": ORIGINAL if name in ("default", "dynamic") else CONTEXT,
        "original_max_position_embeddings": ORIGINAL,
        "rope_theta": 50000.0,
        "rope_scaling": ROPES[name],
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return Phi3Config(**sizes | changes)


def frequencies(config: Phi3Config) -> list[tuple[np.ndarray, float]]:
    """Returns the inverse frequencies and the attention factor for each of `LENGTHS`."""
    inv_freq, attention = config.rope_scaling.frequencies(config.rope_base, jnp.asarray(LENGTHS))
    rows = np.broadcast_to(inv_freq, (len(LENGTHS), config.rotary_dim // 2))
    factors = np.broadcast_to(attention, len(LENGTHS))
    return [(row, float(factor)) for row, factor in zip(rows, factors, strict=True)]


def assert_same_rope(got: Any, expected: Any) -> None:
    """Compares what `frequencies` returns, or another program's frequencies of the same lengths."""
    assert len(got) == len(expected)
    for (got_freq, got_attention), (inv_freq, attention) in zip(got, expected, strict=True):
        np.testing.assert_allclose(got_freq, inv_freq, rtol=1e-6)
        np.testing.assert_allclose(got_attention, attention, rtol=1e-6)
