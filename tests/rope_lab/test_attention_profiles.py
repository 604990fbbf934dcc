"""Attention of sampled queries compared with transformers' attentions."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import phi3small
import pytest
from answers import stored
from compilations import compilations
from reference import GROUPED, Reference, distance, longrope, on_mesh, pair, small_config
from their_layer_ropes import unequal_frequencies, with_layer_ropes

from phi3_jax import LayerFrequencies, Phi3ForCausalLM, Phi3SmallForCausalLM, make_mesh
from phi3_jax.evaluation.scorer import Scorer, frequencies_for
from phi3_jax.rope_lab.inspection import attention_profiles
from phi3_jax.rope_lab.inspection.attention_profiles import (
    AttentionProfile,
    attention_profile,
    distance_bins,
    sample_positions,
)

POSITIONS = [0, 5, 6, 13]
"""Of queries; the last one of the shortest text is among them."""


def text(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(4, 96, count)


@stored(whole=True)
def profile_of_theirs(
    theirs: Reference, ids: np.ndarray, positions: np.ndarray, sink: int, *rope: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the same numbers from all attentions of the reference, in float64."""
    import torch

    with torch.no_grad(), with_layer_ropes(theirs.model, *rope) if rope else nullcontext():
        out = theirs.model(torch.tensor(ids)[None], use_cache=False, output_attentions=True)
    weights = np.stack([each[0].double().numpy() for each in out.attentions])  # [L, N, T, T]
    of_queries = np.moveaxis(weights[:, :, positions], 2, 0)  # [Q, L, N, T]
    apart = positions[:, None] - np.arange(len(ids))
    bins = np.where(apart > 0, np.floor(np.log2(np.maximum(apart, 1))) + 1, apart)  # below 0: later tokens
    count = int(np.ceil(np.log2(len(ids)))) + 1
    after_sink = np.where(np.arange(len(ids)) < sink, 0.0, of_queries)
    mass = [(after_sink * (bins == each)[:, None, None]).sum(-1) for each in range(count)]
    total = after_sink.sum(-1)
    logs = np.log(np.where(of_queries > 0, of_queries, 1.0))
    return {
        "entropy": -(of_queries * logs).sum(-1),
        "sink": of_queries[..., :sink].sum(-1),
        "distance": (after_sink * apart[:, None, None]).sum(-1) / np.where(total > 0, total, 1.0),
        "mass": np.stack(mass, axis=-1),
    }


def assert_same(ours: AttentionProfile, theirs: dict[str, Any]) -> None:
    for name, value in ours._asdict().items():
        assert distance(value, theirs[name]) <= 1e-5, name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of longrope, whose short list holds up to 16 tokens; four query heads share two keys."""
    config = small_config(**longrope(attention_factor=1.3))
    return pair("causal", config, tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_profiles, "MOST_IN_BLOCK", 3)


@pytest.mark.parametrize("length", [14, 16, 41])
def test_matches_transformers_on_both_sides_of_the_switch(models: Any, length: int) -> None:
    ours, theirs = models
    ids, positions = text(length), np.unique([*POSITIONS, *range(14, length, 3), length - 1])
    rope = frequencies_for(ours.config, length)
    counts: list[int] = []
    profile = attention_profile(
        Scorer(ours, chunk=8), ids, *rope, positions=positions, sink_tokens=2, progress=counts.append
    )
    assert_same(profile, profile_of_theirs(theirs, ids, positions, 2))
    np.testing.assert_allclose(profile.mass.sum(-1) + profile.sink, 1, rtol=1e-6)
    assert sum(counts) == length + len(positions)
    other_list = frequencies_for(ours.config, 41 if length <= 16 else 16)
    other = attention_profile(Scorer(ours, chunk=8), ids, *other_list, positions=positions)
    assert distance(other.entropy, profile.entropy) > 1e-3


def test_matches_transformers_in_a_window_with_frequencies_of_layers(tmp_path: Any) -> None:
    config = small_config(sliding_window=9)
    ours, theirs = pair("causal", config, tmp_path, seed=2)
    frequencies = unequal_frequencies(config)
    inv_freq, scaling = frequencies.with_all_axes(config, 1)
    positions = np.array([4, 20, 29])
    profile = attention_profile(Scorer(ours, chunk=16), text(30), frequencies, positions=positions)
    assert_same(profile, profile_of_theirs(theirs, text(30), positions, 4, inv_freq.squeeze(1), scaling))
    assert (profile.mass[..., 5:] == 0).all()  # from distance 16 on


def test_first_tokens_keep_their_frequencies(models: Any) -> None:
    ours, _ = models
    plain = ours.config.rope_base.inv_freq()
    scorer, positions = Scorer(ours, chunk=8), np.array([12, 19])
    unscaled = attention_profile(scorer, text(20), plain, positions=positions)
    all_first = attention_profile(scorer, text(20), plain / 3, initial_tokens=20, positions=positions)
    some = attention_profile(scorer, text(20), plain / 3, initial_tokens=13, positions=positions)
    for one, other in zip(unscaled, all_first, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(some.entropy[0], unscaled.entropy[0])
    assert distance(some.entropy[1], unscaled.entropy[1]) > 1e-3


def test_other_ropes_compile_nothing(models: Any) -> None:
    ours, _ = models
    scorer, plain = Scorer(ours, chunk=8), ours.config.rope_base.inv_freq()
    first = attention_profile(scorer, text(20), plain)
    with compilations() as programs:
        second = attention_profile(scorer, text(20), plain / 2, 1.1)
    assert programs == []
    assert distance(first.mean().mass, second.mean().mass) > 1e-3
    assert second.mean().mass.shape == (2, 4, 6)


def test_samples_the_second_half() -> None:
    assert sample_positions(20, 4).tolist() == [11, 14, 16, 19]
    assert sample_positions(7, 4).tolist() == [3, 4, 5, 6]
    assert distance_bins(20).tolist() == [0, 1, 2, 4, 8, 16, 32]
    assert distance_bins(16).tolist() == [0, 1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match="queries=11 must be from 1 to 10, half of the 20 tokens"):
        sample_positions(20, 11)


def test_rejects_what_it_cannot_inspect(models: Any) -> None:
    plain = models[0].config.rope_base.inv_freq()
    for positions in ([], [20], [-1]):
        with pytest.raises(ValueError, match="positions of queries must be from 0 to 19, and at least one"):
            attention_profile(Scorer(models[0]), text(20), plain, positions=np.array(positions))
    with pytest.raises(ValueError, match="tokens and frequencies have 2 rows; read one at a time"):
        attention_profile(Scorer(models[0]), text(20), np.stack([plain, plain]))
    sparse = Phi3SmallForCausalLM(phi3small.small_config())
    with pytest.raises(ValueError, match="block-sparse layers cannot be inspected; choose one whose layers"):
        attention_profile(Scorer(sparse), text(20), sparse.config.rope_base.inv_freq())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=8", "fsdp=2,tensor=2,context=2"])
def test_matches_one_device_on_a_mesh(sizes: str) -> None:
    one = Phi3ForCausalLM(small_config(**GROUPED))
    frequencies: LayerFrequencies = unequal_frequencies(one.config)
    expected = attention_profile(Scorer(one, chunk=16), text(40), frequencies)
    divided = Scorer(on_mesh(one, make_mesh(sizes)), chunk=16)
    for mine, other in zip(attention_profile(divided, text(40), frequencies), expected, strict=True):
        assert distance(mine, other) <= 1e-5
