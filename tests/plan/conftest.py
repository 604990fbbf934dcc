"""Fixtures of the tests of plans."""

import os

import pytest

from phi3_jax.config.model_config import Phi3Config


@pytest.fixture(autouse=True, scope="session")
def _quiet_libtpu() -> None:
    """Sets what the command sets, except for the platform, which other tests may already use."""
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


@pytest.fixture
def small() -> Phi3Config:
    """A config with grouped heads, no window and sizes that all differ."""
    return Phi3Config(
        vocab_size=192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
