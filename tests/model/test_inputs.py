"""Tests the arguments of a forward: which are accepted, the errors of the others, and 4-D masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import distance, padding_mask, pair, positions, random_ids, run, run_theirs, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.model.arguments import UNSUPPORTED

TOLERANCE = 1e-5
LENGTH = 9
IDS = np.array([[5, 6, 7], [8, 9, 10]])


@pytest.fixture(scope="module")
def model():
    return Phi3ForCausalLM(small_config())


def replaced(row, position, value):
    """Returns `IDS` with another id at one position."""
    ids = IDS.copy()
    ids[row, position] = value
    return ids


ERRORS = {
    "above the vocabulary": (
        {"input_ids": replaced(1, 2, 96)},
        r"input_ids\[1, 2\] = 96 is outside the vocabulary of 96 tokens",
    ),
    "negative id": ({"input_ids": replaced(0, 1, -1)}, r"input_ids\[0, 1\] = -1 is outside the vocabulary"),
    "float ids": (
        {"input_ids": IDS.astype(np.float32)},
        r"input_ids is float32\[2, 3\]; expected integers of shape \[batch, length\]",
    ),
    "one row without a batch": (
        {"input_ids": IDS[0]},
        r"input_ids is int\d+\[3\]; expected integers of shape",
    ),
    "three dims": ({"input_ids": IDS[None]}, r"input_ids is int\d+\[1, 2, 3\]; expected integers"),
    "empty batch": ({"input_ids": IDS[:0]}, "nothing to compute: the batch has 0 rows of 3 tokens"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "nothing to compute: the batch has 2 rows of 0 tokens"),
    "neither": ({}, "give exactly one of input_ids and inputs_embeds"),
    "both": (
        {"input_ids": IDS, "inputs_embeds": np.zeros((2, 3, 48), np.float32)},
        "give exactly one of input_ids and inputs_embeds",
    ),
    "width of the embeddings": (
        {"inputs_embeds": np.zeros((2, 3, 47), np.float32)},
        r"inputs_embeds has shape \(2, 3, 47\); expected \[batch, length, 48\]",
    ),
    "dims of the embeddings": (
        {"inputs_embeds": np.zeros((3, 48), np.float32)},
        r"inputs_embeds has shape \(3, 48\); expected \[batch, length, 48\]",
    ),
    "mask too short": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 2))},
        r"attention_mask has shape \(2, 2\); expected \(2, 3\)$",
    ),
    "mask too long": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 4))},
        r"attention_mask has shape \(2, 4\); expected \(2, 3\)$",
    ),
    "mask of another batch": (
        {"input_ids": IDS, "attention_mask": np.ones((1, 3))},
        r"attention_mask has shape \(1, 3\); expected \(2, 3\)",
    ),
    "mask of one dim": (
        {"input_ids": IDS, "attention_mask": np.ones(3)},
        r"attention_mask has shape \(3,\); expected \(2, 3\)",
    ),
    "mask of three dims": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 3, 3))},
        r"attention_mask has shape \(2, 3, 3\); expected \(2, 3\)",
    ),
    "heads of a 4-D mask": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 2, 3, 3), bool)},
        r"the 4-D attention_mask has shape \(2, 2, 3, 3\); expected \(2, 1 or 4, 3, 3\)$",
    ),
    "keys of a 4-D mask": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 1, 3, 4), bool)},
        r"the 4-D attention_mask has shape \(2, 1, 3, 4\); expected",
    ),
    "position_ids": (
        {"input_ids": IDS, "position_ids": np.arange(4)[None]},
        r"position_ids is int\d+\[1, 4\]; expected integers of shape \[2, 3\]",
    ),
    "position_ids of one dim": (
        {"input_ids": IDS, "position_ids": np.arange(3)},
        r"position_ids is int\d+\[3\]; expected integers of shape \[2, 3\]",
    ),
    "float position_ids": (
        {"input_ids": IDS, "position_ids": np.full((2, 3), 0.5, np.float32)},
        r"position_ids is float32\[2, 3\]; expected integers of shape \[2, 3\]",
    ),
}


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("case", ERRORS)
def test_rejects_arguments(case, convert, model):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        model(**{name: convert(value) for name, value in arguments.items()})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"return_dict": False}, ValueError, "return_dict=False is not supported; take the fields"),
        ({"is_causal": False}, ValueError, "is_causal=False is not supported; give a 4-D attention_mask"),
        ({"cu_seq_lens_q": np.arange(2)}, ValueError, "cu_seq_lens_q=.* is not supported; give segment_ids"),
        ({"positions": IDS}, TypeError, "the model has no argument 'positions'"),
    ],
)
def test_refuses_other_arguments_by_name(arguments, error, message, model):
    with pytest.raises(error, match=message):
        model(IDS, **arguments)


def test_accepts_arguments_that_ask_for_nothing(model):
    neutral = {name: values[-1] for name, (values, _) in UNSUPPORTED.items()}
    assert neutral["return_dict"] is True
    jax.eval_shape(lambda model: model(IDS, **neutral), model)


def test_rejects_lists_of_different_lengths(model):
    with pytest.raises(ValueError, match="input_ids has rows of 1 to 3 entries; pad them to one length"):
        model([[1, 2, 3], [4]])
    with pytest.raises(ValueError, match="attention_mask has rows of 1 to 3 entries; pad them"):
        model(IDS, [[1, 1, 1], [1]])
    with pytest.raises(ValueError, match="input_ids has rows of 1 to 3 entries"):
        model([[1, 2, 3], [4]], labels=[[1, 2, 3], [4]])
    with pytest.raises(ValueError, match="labels has rows of 1 to 3 entries"):
        model(IDS, labels=[[1, 2, 3], [4]])


def test_checks_ids_before_they_become_int32(model):
    with pytest.raises(ValueError, match=r"input_ids\[1, 0\] = 4294967296 is outside the vocabulary"):
        model(replaced(1, 0, 2**32))


def test_rejects_masks_that_do_not_fit_the_cache(model):
    cache = run(model, input_ids=IDS, past_key_values=model.init_cache(2, 8)).past_key_values
    for shape in ((2, 2), (2, 9), (3, 6)):
        with pytest.raises(
            ValueError, match=r"attention_mask has shape .* or with the cached tokens before them"
        ):
            model(IDS, np.ones(shape), past_key_values=cache)
    with pytest.raises(ValueError, match=r"expected \(2, 1 or 4, 3, 8\), the last being the cache's slots"):
        model(IDS, np.ones((2, 1, 3, 6), bool), past_key_values=cache)


def test_checks_shapes_under_jit(model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 2\)"):
        run(model, input_ids=IDS, attention_mask=np.ones((2, 2)))


def test_accepts_any_kind_of_array(model):
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    expected = np.asarray(run(model, input_ids=IDS, attention_mask=mask).logits)
    for ids in (IDS, IDS.astype(np.int8), jnp.asarray(IDS), jnp.asarray(IDS, jnp.uint8), IDS.tolist()):
        for given in (mask, mask.astype(bool), jnp.asarray(mask, jnp.float32), mask.tolist()):
            checked = jax.eval_shape(lambda m, i=ids, g=given: m(i, g).logits, model)
            assert checked.shape == expected.shape
    for ids, given in ((jnp.asarray(IDS, jnp.uint8), mask.astype(bool)), (IDS, mask.astype(np.float32))):
        np.testing.assert_array_equal(run(model, input_ids=ids, attention_mask=given).logits, expected)


def test_inputs_embeds_match_transformers(tmp_path):
    ours, theirs = pair("causal", small_config(), tmp_path)
    mask = padding_mask(2, LENGTH, "left")
    embeds = np.random.default_rng(0).normal(size=(2, LENGTH, 48)).astype(np.float32)
    out = run(ours, inputs_embeds=embeds, attention_mask=mask)
    ref = run_theirs(theirs, None, mask, inputs_embeds=embeds)
    assert distance(out.logits, ref.logits, mask.astype(bool)[..., None]) <= TOLERANCE


def test_position_ids_match_transformers(tmp_path):
    ours, theirs = pair("causal", small_config(), tmp_path)
    mask = np.ones((2, LENGTH), np.int64)
    ids = random_ids(ours.config, mask)
    own = np.stack([np.arange(LENGTH) * 2 + 3, np.arange(LENGTH)[::-1]])
    for given in (own, own[:1]):
        out = run(ours, input_ids=ids, position_ids=given)
        ref = run_theirs(theirs, ids, mask, position_ids=given)
        assert distance(out.logits, ref.logits) <= TOLERANCE


# Masks of four dimensions


def random_4d_mask(heads, seed=0):
    """Returns a random mask that is not causal; every query sees itself."""
    visible = np.random.default_rng(seed).random((2, heads, LENGTH, LENGTH)) < 0.5
    return visible | np.eye(LENGTH, dtype=bool)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_4d_masks_match_transformers(heads, window, tmp_path):
    """A 4-D mask is used as it is: neither causality nor the window is added."""
    config = small_config(sliding_window=window)
    ours, theirs = pair("causal", config, tmp_path)
    everything = np.ones((2, LENGTH), np.int64)
    ids = random_ids(config, everything)
    visible = random_4d_mask(heads)
    hidden = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    bias = np.random.default_rng(1).normal(size=hidden.shape).astype(np.float32)
    at = positions(everything)
    for additive in (hidden, np.where(visible, bias, hidden)):
        ref = run_theirs(theirs, ids, additive, position_ids=at).logits
        assert distance(run(ours, input_ids=ids, attention_mask=additive).logits, ref) <= TOLERANCE
    ref = run_theirs(theirs, ids, hidden, position_ids=at).logits
    assert distance(run(ours, input_ids=ids, attention_mask=visible).logits, ref) <= TOLERANCE
    assert (
        distance(run(ours, input_ids=ids, attention_mask=visible.astype(np.int32)).logits, ref) <= TOLERANCE
    )


@pytest.mark.slow
def test_4d_masks_serve_all_rows_and_cover_the_cache(model):
    ids = random_ids(model.config, np.ones((2, LENGTH), np.int64))
    visible = np.tril(np.ones((LENGTH, LENGTH), bool))[None, None]
    expected = run(model, input_ids=ids).logits
    assert distance(run(model, input_ids=ids, attention_mask=visible).logits, expected) <= TOLERANCE
    slots = 12
    over_slots = np.pad(visible, ((0, 0), (0, 0), (0, 0), (0, slots - LENGTH)))
    cache = model.init_cache(2, slots)
    first = run(model, input_ids=ids[:, :6], attention_mask=over_slots[:, :, :6], past_key_values=cache)
    second = run(
        model,
        input_ids=ids[:, 6:],
        attention_mask=over_slots[:, :, 6:],
        past_key_values=first.past_key_values,
    )
    logits = np.concatenate([first.logits, second.logits], axis=1)
    assert distance(logits, expected) <= TOLERANCE


def test_queries_without_a_visible_key_give_no_nan(tmp_path):
    config = small_config()
    ours, theirs = pair("causal", config, tmp_path)
    mask = padding_mask(3, LENGTH, "left")
    mask[2] = 0
    ids = random_ids(config, mask)
    out = run(ours, input_ids=ids, attention_mask=mask)
    assert np.isfinite(out.logits).all()
    ref = run_theirs(theirs, ids, mask).logits
    assert (
        distance(out.logits, ref, (mask.sum(axis=1) > 0)[:, None, None] & mask.astype(bool)[..., None])
        <= TOLERANCE
    )
    nothing = np.zeros((3, 1, LENGTH, LENGTH), bool)
    assert np.isfinite(run(ours, input_ids=ids, attention_mask=nothing).logits).all()
    gradient = jax.jit(jax.grad(lambda m: m(ids, nothing).logits.sum()))(ours)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
