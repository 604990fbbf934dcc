"""The rules that each field of a model's config keeps by itself."""

from collections.abc import Callable, Mapping
from typing import Any

from phi3_jax.config.rope_types import is_number, is_positive

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

MOST_LABELS = 2**20
"""Their default names are all in memory."""


def is_size(value: Any) -> bool:
    """Whether this is a size that int32 can hold."""
    return type(value) is int and 0 < value < 2**31


def is_rate(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


Rules = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""The rule of each field, in words and as a test."""

RULES: Rules = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim"),
            *("max_position_embeddings", "original_max_position_embeddings"),
        ),
        ("a positive integer below 2**31", is_size),
    ),
    "num_labels": (
        f"a positive integer, at most {MOST_LABELS:,}",
        lambda v: is_size(v) and v <= MOST_LABELS,
    ),
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attention_dropout"),
        ("a rate from 0 (no dropout) to below 1", is_rate),
    ),
    **dict.fromkeys(
        ("classifier_dropout", "hidden_dropout"),
        ("a rate from 0 (no dropout) to below 1, or None", lambda v: v is None or is_rate(v)),
    ),
    "initializer_range": ("a number, 0 or more", lambda v: is_number(v) and v >= 0),
    "rms_norm_eps": ("a positive number of float32's range, such as 1e-05", is_positive),
    "tie_word_embeddings": ("true or false", lambda v: type(v) is bool),
    "hidden_act": ("the name of an activation", lambda v: isinstance(v, str)),
    "rope_theta": ("a number above 1, such as 10000.0", lambda v: is_number(v) and v > 1),
    "partial_rotary_factor": ("above 0 and at most 1 (all dims)", lambda v: is_number(v) and 0 < v <= 1),
    "sliding_window": ("a positive integer, or None for no window", lambda v: v is None or is_size(v)),
    "problem_type": (f"one of {', '.join(PROBLEM_TYPES)}, or None", lambda v: v in (None, *PROBLEM_TYPES)),
}

FORGIVING = (
    *("resid_pdrop", "embd_pdrop", "attention_dropout", "classifier_dropout", "hidden_dropout"),
    *("initializer_range", "problem_type"),
)
"""Fields on which no number of the forward depends: what a file has there is read as far as it can be."""
