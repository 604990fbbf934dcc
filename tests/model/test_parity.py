"""Tests the causal model against transformers: every output, and the gradient of every parameter."""

import numpy as np
import pytest
from reference import (
    HALF_ROTARY,
    assert_same_gradients,
    distance,
    gradients,
    longrope,
    padding_mask,
    pair,
    random_ids,
    run_theirs,
    small_config,
)

TOLERANCE = 1e-5

CASES = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 20},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 5},
    "gelu": {"hidden_act": "gelu_new"},
    "longrope short": longrope(20),
    "longrope long": longrope(12),
    "longrope factor": longrope(12, attention_factor=1.7),
    "longrope partial": longrope(12, **HALF_ROTARY) | {"partial_rotary_factor": 0.5},
}
LENGTH = 20


@pytest.mark.optimized
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, side, tmp_path):
    config = small_config(**CASES[case])
    ours, theirs = pair("causal", config, tmp_path)
    mask = padding_mask(3, LENGTH, side)
    ids = random_ids(config, mask)
    labels = np.where((mask == 1) & (np.arange(LENGTH) != 7), ids, -100)
    flags = {"output_hidden_states": True, "output_attentions": True}
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=labels, **flags)
    ref = run_theirs(theirs, ids, mask, labels=labels, gradients=True, **flags)
    token = mask.astype(bool)
    assert distance(out.logits, ref.logits, token[..., None]) <= TOLERANCE
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert len(out.hidden_states) == len(ref.hidden_states) == config.num_hidden_layers + 1
    for mine, other in zip(out.hidden_states, ref.hidden_states, strict=True):
        assert distance(mine, other, token[..., None]) <= TOLERANCE
    assert len(out.attentions) == len(ref.attentions)
    for mine, other in zip(out.attentions, ref.attentions, strict=True):
        assert distance(mine, other, token[:, None, :, None]) <= TOLERANCE
    assert_same_gradients(ours_gradient, ref, TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_visible_padding_tokens_match_transformers(tied, tmp_path):
    """The padding token's embedding gets no gradient from look-ups, only from a tied head."""
    config = small_config(tie_word_embeddings=tied)
    ours, theirs = pair("causal", config, tmp_path)
    mask = np.ones((2, LENGTH), np.int64)
    ids = random_ids(config, mask)
    ids[:, [0, 7]] = config.pad_token_id
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=ids)
    ref = run_theirs(theirs, ids, mask, labels=ids, gradients=True)
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert_same_gradients(ours_gradient, ref, TOLERANCE)
    row = ours_gradient["model.embed_tokens.weight"][config.pad_token_id]
    assert bool(np.abs(row).max() > 0) is tied
