"""Tests packed rows: each example has the results that it has alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from marks import slow
from reference import (
    CLASSES,
    GROUPED,
    assert_same_gradients,
    assert_same_leaves,
    distance,
    longrope,
    on_mesh,
    pair,
    run_theirs,
    small_config,
)

from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.arguments import check, locate
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels import cudnn
from phi3_jax.model.layer_stack import stack_layers
from phi3_jax.model.masks import CausalMask
from phi3_jax.parallel.sharding import make_mesh

LENGTH = 64
ROWS = [[9, 14, 5, 16, 12], [20, 30], [3, 16, 16, 16], [40, 17]]
"""The examples' lengths, row by row. Longrope's original length is 16: rows are all short or all long."""


def grouped_config(length=512, **changes):
    """Returns a config with a context of `length` tokens."""
    lengths = {"max_position_embeddings": length, "original_max_position_embeddings": length}
    return small_config(**GROUPED, **lengths, **changes)


def packed_rows(rows=ROWS, length=LENGTH, seed=0):
    """Returns token ids and segments [B, T], with padding at the end; segment numbers are not in order."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((len(rows), length), np.int32)
    for row, sizes in enumerate(rows):
        numbers = np.repeat(rng.permutation(len(sizes)) + 1, sizes)
        segments[row, : len(numbers)] = numbers
    ids = np.where(segments, rng.integers(4, 96, segments.shape), 3)
    return ids, segments


def examples(segments):
    """Yields the row of each example, and its indices in the row."""
    for row, numbers in enumerate(segments):
        for number in sorted(set(numbers) - {0}):
            yield row, np.flatnonzero(numbers == number)


def unpacked(ids, segments):
    """Returns ids with each example in a row of its own, and their mask."""
    sources = list(examples(segments))
    alone = np.full((len(sources), ids.shape[1]), 3)
    mask = np.zeros_like(alone)
    for index, (row, where) in enumerate(sources):
        alone[index, : len(where)] = ids[row, where]
        mask[index, : len(where)] = 1
    return alone, mask


def shifted_labels(ids, segments):
    """Returns labels without the first token of each example, as another example precedes it."""
    first = np.diff(segments, axis=1, prepend=0) != 0
    return np.where((segments != 0) & ~first, ids, -100)


def block_diagonal(segments):
    """Returns a mask [B, 1, T, T]; padding sees earlier padding, so every query sees a key."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same & np.tril(np.ones(same.shape[1:], bool)))[:, None]


def positions_within(segments):
    """Returns positions counted from 0 in each example."""
    positions = np.zeros_like(segments)
    for row, where in examples(segments):
        positions[row, where] = np.arange(len(where))
    return positions


def repacked(values, segments):
    """Returns the examples' values [examples, T, ...] as [B, T, ...], at the examples' indices."""
    values = np.asarray(values)
    out = np.zeros((*segments.shape, *values.shape[2:]), values.dtype)
    for index, (row, where) in enumerate(examples(segments)):
        out[row, where] = values[index, : len(where)]
    return out


@partial(jax.jit, static_argnames="hidden")
def output_and_gradients(model, arguments, hidden=True):

    def loss(model):
        out = model(**arguments, output_hidden_states=hidden)
        return out.loss, out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return out, gradients


def assert_equals_examples_alone(model, ids, segments, hidden=True, packed_model=None):
    """Checks outputs and gradients of a packed batch against those of its examples in rows of their own.

    Both losses are divided by the same number of labels. `packed_model` runs the packed batch.
    """
    labels = shifted_labels(ids, segments)
    alone, mask = unpacked(ids, segments)
    packed_arguments = {"input_ids": ids, "segment_ids": segments, "labels": labels}
    arguments = {
        "input_ids": alone,
        "attention_mask": mask,
        "labels": np.where(mask, alone, -100),
        "num_items_in_batch": np.sum(labels != -100),
    }
    out, gradients = output_and_gradients(packed_model or model, packed_arguments, hidden)
    expected, expected_gradients = output_and_gradients(model, arguments, hidden)
    assert len(out.hidden_states or ()) == (model.config.num_hidden_layers + 1 if hidden else 0)
    states = (out.hidden_states or (), expected.hidden_states or ())
    tokens = segments != 0
    for ours, theirs in [(out.logits, expected.logits), *zip(*states, strict=True)]:
        assert distance(np.asarray(ours)[tokens], repacked(theirs, segments)[tokens]) <= 1e-5
    assert distance(out.loss, expected.loss) <= 1e-5
    assert_same_leaves(gradients, expected_gradients)


@pytest.mark.parametrize("window", [7, slow(None)])
def test_examples_in_one_row_equal_examples_alone(window):
    model = Phi3ForCausalLM(small_config(**GROUPED, **longrope(), sliding_window=window))
    assert_equals_examples_alone(model, *packed_rows())


@pytest.mark.slow
def test_examples_in_one_row_equal_examples_alone_in_stacked_layers():
    model = stack_layers(Phi3ForCausalLM(small_config(**GROUPED, **longrope(), sliding_window=7)))
    model.gradient_checkpointing_enable()
    assert_equals_examples_alone(model, *packed_rows(), hidden=False)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_each_kernel_equals_examples_alone(implementation):
    """Rows are longer than a block of XLA's attention and of the Pallas kernel, which is interpreted."""
    model = Phi3ForCausalLM(grouped_config(sliding_window=90))
    chosen = on_mesh(model, None)
    chosen.set_attn_implementation(implementation)
    assert_equals_examples_alone(model, *packed_rows([[130, 70, 60], [100, 110]], 271), packed_model=chosen)


def vectors(length, dtype=np.float32):
    """Returns queries, keys and values of two rows, four heads on two, and the mask of two packed rows."""
    rng = np.random.default_rng(0)
    shapes = (2, length, 2, 2, 64), (2, 2, length, 64), (2, 2, length, 64)
    _, segments = packed_rows([[length // 2, length // 3], [length // 5, length // 3, length // 4]], length)
    slots = np.arange(length)[None]
    mask = CausalMask(slots.repeat(2, 0), slots, segments != 0, None, True, segments, segments)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], mask


@pytest.mark.usefixtures("xla_for_cudnn")
def test_arguments_of_cudnn_describe_this_attention():
    """The length is odd."""
    arrays, mask = vectors(101)
    out = np.asarray(cudnn.cudnn_attention(*arrays, mask, scale=0.3))
    expected = np.asarray(attention(*arrays, mask.dense(), scale=0.3)[0])
    assert distance(out[mask.key_mask], expected[mask.key_mask]) <= 1e-5


@pytest.mark.usefixtures("cudnn_is_installed")
def test_a_gpu_takes_xla_by_default():
    """cuDNN would need a mask of T x T."""
    arrays, mask = vectors(256, jnp.bfloat16)
    alone = dataclasses.replace(mask, query_segments=None, key_segments=None)

    def takes_cudnn(mask, implementation):
        run = jax.jit(partial(attention, scale=0.3, implementation=implementation))
        return "__cudnn$fmha" in run.trace(*arrays, mask).lower(lowering_platforms=("cuda",)).as_text()

    assert not takes_cudnn(mask, None)
    assert takes_cudnn(mask, "cudnn")
    assert takes_cudnn(alone, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "length"),
    [("xla", LENGTH), ("pallas", 256)],
)
def test_a_mesh_equals_one_device(implementation, length):
    """Queries are divided over `context`; keys and their segments are not."""
    one = Phi3ForCausalLM(grouped_config(sliding_window=7))
    several = on_mesh(one, make_mesh("fsdp=2,context=2,tensor=2"))
    several.set_attn_implementation(implementation)
    scale = length // LENGTH
    ids, segments = packed_rows([[size * scale for size in row] for row in ROWS], length)
    labels = shifted_labels(ids, segments)
    arguments = {"input_ids": ids, "segment_ids": segments, "labels": labels}
    out, gradients = output_and_gradients(several, arguments)
    expected, expected_gradients = output_and_gradients(one, arguments)
    assert distance(out.logits, expected.logits, (segments != 0)[..., None]) <= 1e-5
    assert_same_leaves(gradients, expected_gradients, 2e-5)


@pytest.mark.parametrize("kind", ["causal", "token"])
def test_matches_transformers_with_a_block_diagonal_mask(kind, tmp_path):
    config = small_config(head_dim=12, num_labels=5, classifier_dropout=0.0)
    ours, theirs = pair(kind, config, tmp_path)
    ids, segments = packed_rows(ROWS[:2])
    labels = shifted_labels(ids, segments)
    labels = labels if kind == "causal" else np.where(labels == -100, -100, ids % 5)
    out, gradients = reference.gradients(ours, input_ids=ids, segment_ids=segments, labels=labels)
    mask = np.where(block_diagonal(segments), np.float32(0), np.finfo(np.float32).min)
    at = positions_within(segments)
    ref = run_theirs(theirs, ids, mask, position_ids=at, labels=labels, gradients=True)
    assert distance(out.loss, ref.loss) <= 1e-5
    assert distance(out.logits, ref.logits, (segments != 0)[..., None]) <= 1e-5
    assert_same_gradients(gradients, ref, 1e-5)


@pytest.mark.slow
def test_given_positions_and_masks_are_used():
    """A token is padding by the mask or by segment 0, also inside an example."""
    model = Phi3ForCausalLM(small_config(**GROUPED))
    ids, segments = packed_rows()
    mask = np.ones_like(segments)
    mask[:, [1, 11, 12, 30]] = 0
    tokens = (mask != 0) & (segments != 0)
    run = jax.jit(lambda **arguments: model(ids, **arguments).logits)
    counted = positions_within(np.where(tokens, segments, 0))
    own = np.where(tokens, segments, 0)
    expected = np.asarray(run(segment_ids=own, position_ids=counted))[tokens]
    assert distance(np.asarray(run(segment_ids=segments, attention_mask=mask))[tokens], expected) <= 1e-6
    moved = np.asarray(run(segment_ids=own, position_ids=2 * counted))[tokens]
    assert distance(moved, expected) > 1e-2
    own_mask = block_diagonal(own)
    equal = np.asarray(run(attention_mask=own_mask, position_ids=2 * counted))[tokens]
    assert distance(moved, equal) <= 1e-5


@pytest.mark.slow
def test_positions_restart_where_a_segment_begins():
    ids = np.ones((2, 9), int)
    segments = np.array([[7, 7, 7, 2, 2, -1, -1, 0, 0], [0, 5, 5, 5, 5, 0, 1, 1, 2]])
    mask = np.ones((2, 9), int)
    mask[1, 3] = 0
    new = check(small_config(), None, ids, attention_mask=mask, segment_ids=segments)
    where = locate(new, None, small_config())
    tokens = (mask != 0) & (segments != 0)
    expected = np.array([[0, 1, 2, 0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 2, 0, 0, 1, 0]])
    np.testing.assert_array_equal(np.asarray(where.position_ids)[tokens], expected[tokens])
    np.testing.assert_array_equal(where.mask.key_segments, np.where(tokens, segments, 0))
    np.testing.assert_array_equal(where.key_mask, tokens)
    np.testing.assert_array_equal(where.rope_length, [3, 3])


@pytest.mark.parametrize("window", [None, 3])
def test_has_visible_key_and_last_queries_match_the_dense_mask(window):
    _, segments = packed_rows()
    slots = np.arange(LENGTH)[None]
    mask = CausalMask(slots.repeat(4, 0), slots, segments != 0, window, True, segments, segments)
    np.testing.assert_array_equal(mask.has_visible_key(), mask.dense()[:, 0].any(axis=2))
    last = mask.last_queries(5)
    np.testing.assert_array_equal(last.dense(), mask.dense()[:, :, -5:])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("mesh", [None, "data=2,context=2,tensor=2"])
def test_last_logits_equal_those_of_all_tokens(implementation, mesh):
    """The last layer has fewer queries than keys."""
    model = on_mesh(Phi3ForCausalLM(small_config(**GROUPED)), mesh and make_mesh(mesh))
    model.set_attn_implementation(implementation)
    ids, segments = packed_rows([[9, 14, 5, 30, 6], [20, 40, 4]])
    run = jax.jit(lambda keep: model(ids, segment_ids=segments, logits_to_keep=keep).logits, static_argnums=0)
    assert distance(run(9), np.asarray(run(0))[:, -9:]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_every_head_passes_segments_to_the_decoder(kind):
    config = small_config(num_labels=3, classifier_dropout=0.0)
    model = CLASSES[kind][1](config)
    ids, segments = packed_rows([[8, 8]], 16)
    apart = model(ids, segment_ids=segments)
    together = model(ids)
    key = "last_hidden_state" if kind == "base" else "logits"
    assert distance(getattr(apart, key), getattr(together, key)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"segment_ids": np.ones((2, 7), np.int32)},
            r"segment_ids is int32\[2, 7\]; expected integers of shape",
        ),
        ({"segment_ids": np.ones((2, 8))}, r"segment_ids is float\d+\[2, 8\]; expected integers"),
        ({"attention_mask": np.ones((2, 1, 8, 8), bool)}, "both say who sees whom; give one of them"),
        ({"use_cache": True}, "segment_ids go without a cache"),
        ({"past_key_values": 16}, "segment_ids go without a cache"),
    ],
)
def test_rejects_segments_that_do_not_fit(changes, message):
    model = Phi3ForCausalLM(small_config())
    arguments = {"segment_ids": np.ones((2, 8), np.int64)} | changes
    if "past_key_values" in changes:
        arguments["past_key_values"] = model.init_cache(2, changes["past_key_values"])
    with pytest.raises(ValueError, match=message):
        model(np.ones((2, 8), int), **arguments)


def test_a_training_step_for_a_tpu_has_no_mask_of_length_squared():
    """Lowered for an absent TPU, a step over packed rows has three kernels a layer, and nothing of T x T."""
    length = 1024
    model = Phi3ForCausalLM(grouped_config(length, num_hidden_layers=1), dtype=jnp.bfloat16)
    ids, segments = packed_rows([[500, 400]], length)

    def loss(model, ids, segments):
        return model(ids, segment_ids=segments, labels=ids).loss

    traced = jax.jit(jax.grad(loss)).trace(model, ids, segments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3
    assert f"{length}x{length}" not in text
