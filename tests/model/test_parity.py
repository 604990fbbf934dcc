"""The decoder and the heads against transformers: every output, and the gradient of every parameter."""

import numpy as np
import pytest
import torch
from reference import (
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
    "longrope short": longrope() | {"original_max_position_embeddings": 20},
    "longrope long": longrope() | {"original_max_position_embeddings": 12},
    "longrope factor": longrope(attention_factor=1.7) | {"original_max_position_embeddings": 12},
    "longrope partial": longrope(short_factor=[1.0, 1.2, 1.9], long_factor=[1.5, 3.0, 9.0])
    | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 12},
}
LENGTH = 20


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_causal_lm(case, side, tmp_path):
    config = small_config(**CASES[case])
    ours, theirs = pair("causal", config, tmp_path)
    mask = padding_mask(3, LENGTH, side)
    ids = random_ids(config, mask)
    labels = np.where((mask == 1) & (np.arange(LENGTH) != 7), ids, -100)
    flags = {"output_hidden_states": True, "output_attentions": True}
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=labels, **flags)
    ref = run_theirs(theirs, ids, mask, labels=torch.tensor(labels), **flags)
    token = mask.astype(bool)
    assert distance(out.logits, ref.logits, token[..., None]) <= TOLERANCE
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert len(out.hidden_states) == len(ref.hidden_states) == config.num_hidden_layers + 1
    for mine, other in zip(out.hidden_states, ref.hidden_states, strict=True):
        assert distance(mine, other, token[..., None]) <= TOLERANCE
    assert len(out.attentions) == len(ref.attentions)
    for mine, other in zip(out.attentions, ref.attentions, strict=True):
        assert distance(mine, other, token[:, None, :, None]) <= TOLERANCE

    ref.loss.backward()
    assert_same_gradients(ours_gradient, theirs, TOLERANCE)
