"""Tests the three heads against transformers: logits, losses, gradients and errors."""

import jax
import numpy as np
import pytest
from answers import stored
from marks import slow
from reference import (
    assert_same_gradients,
    distance,
    gradients,
    padding_mask,
    pair,
    random_ids,
    run,
    run_theirs,
    small_config,
)

from phi3_jax import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification

TOLERANCE = 1e-5
LENGTH = 12
PAD = 3

PROBLEMS = {
    "regression": ({"num_labels": 1, "problem_type": "regression"}, [0.5, -1.0, 2.0]),
    "regression of several": (
        {"num_labels": 3, "problem_type": "regression"},
        [[0.5, 1.0, -2.0], [0.1, 0.2, 0.3], [3.0, -1.0, 0.0]],
    ),
    "single label": ({"num_labels": 4, "problem_type": "single_label_classification"}, [3, 0, 2]),
    "single label, one ignored": (
        {"num_labels": 4, "problem_type": "single_label_classification"},
        [3, -100, 2],
    ),
    "multi label": (
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]],
    ),
    "unset, one output": ({"num_labels": 1}, [0.5, -1.0, 2.0]),
    "unset, integers": ({"num_labels": 3}, [2, 0, 1]),
    "unset, numbers": ({"num_labels": 3}, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]),
}


def token_labels(mask, classes, seed=1):
    """Returns a class for most tokens, and -100 for the others and for padding."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, mask.shape)
    return np.where((mask == 1) & (rng.random(mask.shape) < 0.7), labels, -100)


# Sequence classification


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_sequence_classifier_matches_transformers(problem, side, tmp_path):
    changes, labels = PROBLEMS[problem]
    config = small_config(**changes)
    ours, theirs = pair("sequence", config, tmp_path)
    mask = padding_mask(3, LENGTH, side)
    ids = random_ids(config, mask)
    labels = np.asarray(labels, np.float32 if isinstance(np.ravel(labels)[0], float) else np.int64)
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=labels)
    ref = run_theirs(theirs, ids, mask, labels=labels, gradients=True)
    assert out.logits.shape == (3, config.num_labels)
    assert distance(out.logits, ref.logits) <= TOLERANCE
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert_same_gradients(ours_gradient, ref, TOLERANCE)


def test_sequence_classifier_finds_the_last_token_by_its_id(tmp_path):
    config = small_config(num_labels=3)
    ours, theirs = pair("sequence", config, tmp_path)
    ids = random_ids(config, np.ones((5, LENGTH), np.int64))
    mask = np.ones_like(ids)
    ids[0, 4] = PAD  # in the middle of the text
    ids[1, 0] = ids[1, -1] = PAD
    ids[2] = PAD  # only padding: the first position counts
    mask[2] = 0
    mask[3, -3:] = 0  # masked, but not the padding token
    ids[4] = PAD
    out = run(ours, input_ids=ids, attention_mask=mask)
    ref = run_theirs(theirs, ids, mask)
    assert np.isfinite(out.logits).all()
    assert distance(out.logits, ref.logits) <= TOLERANCE


def test_sequence_classifier_takes_the_last_embedding(tmp_path):
    config = small_config(num_labels=3)
    ours, theirs = pair("sequence", config, tmp_path)
    embeds = np.random.default_rng(0).normal(size=(2, LENGTH, config.hidden_size)).astype(np.float32)
    mask = padding_mask(2, LENGTH, "right")
    out = run(ours, inputs_embeds=embeds, attention_mask=mask)
    ref = run_theirs(theirs, None, mask, inputs_embeds=embeds)
    assert distance(out.logits, ref.logits) <= TOLERANCE


def test_sequence_classifier_without_a_padding_token_takes_one_row(tmp_path):
    config = small_config(num_labels=3, pad_token_id=None)
    ours, theirs = pair("sequence", config, tmp_path)
    ids = np.array([[5, 6, 7, PAD]])
    out = run(ours, input_ids=ids)
    assert distance(out.logits, run_theirs(theirs, ids, None).logits) <= TOLERANCE
    with pytest.raises(ValueError, match=r"batch of 2 rows needs pad_token_id"):
        ours(np.array([[5, 6], [7, 8]]))
    with pytest.raises(ValueError, match=r"batch of 2 rows needs pad_token_id"):
        ours(inputs_embeds=np.zeros((2, 4, config.hidden_size), np.float32))


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"num_labels": 3}, [0, 3], r"labels\[1\] = 3; expected 0 to 2, or -100"),
        ({"num_labels": 3}, [0, -1], r"labels\[1\] = -1; expected 0 to 2, or -100"),
        ({"num_labels": 3}, [2**32, 0], r"labels\[0\] = 4294967296; expected 0 to 2"),
        ({"num_labels": 3}, [0, 1, 2], r"labels is int\d+\[3\]; expected integers of shape \[2\]"),
        (
            {"num_labels": 3, "problem_type": "single_label_classification"},
            [0.0, 1.0],
            r"labels is float\d+\[2\]; expected integers of shape \[2\]",
        ),
        ({"num_labels": 1}, [[0.0, 1.0], [1.0, 0.0]], r"labels has shape \[2, 2\].*num_labels=1 needs \[2\]"),
        (
            {"num_labels": 3, "problem_type": "regression"},
            [0.0, 1.0],
            r"labels has shape \[2\]; regression with num_labels=3 needs \[2, 3\]",
        ),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[1.0, 0.0], [0.0, 1.0]],
            r"labels has shape \[2, 2\]; multi_label_classification with num_labels=3 needs \[2, 3\]",
        ),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]],  # the right count, transposed
            r"labels has shape \[3, 2\]",
        ),
    ],
)
def test_sequence_classifier_rejects_invalid_labels(settings, labels, message):
    model = Phi3ForSequenceClassification(small_config(**settings))
    with pytest.raises(ValueError, match=message):
        model(np.array([[5, 6], [7, 8]]), labels=np.asarray(labels))


def test_sequence_classifier_takes_labels_as_a_column():
    model = Phi3ForSequenceClassification(small_config(num_labels=3))
    ids = np.array([[5, 6], [7, 8]])
    flat, column = (
        run(model, input_ids=ids, labels=labels).loss for labels in (np.array([2, 0]), np.array([[2], [0]]))
    )
    assert flat == column


# Token classification


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_token_classifier_matches_transformers(side, tmp_path):
    config = small_config(num_labels=5)
    ours, theirs = pair("token", config, tmp_path)
    assert np.abs(np.asarray(ours.score.bias[...])).min() > 0
    mask = padding_mask(3, LENGTH, side)
    ids = random_ids(config, mask)
    labels = token_labels(mask, 5)
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=labels)
    ref = run_theirs(theirs, ids, mask, labels=labels, gradients=True)
    assert distance(out.logits, ref.logits, mask.astype(bool)[..., None]) <= TOLERANCE
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert_same_gradients(ours_gradient, ref, TOLERANCE)


@stored
def dropout_rate(theirs):
    """Returns the dropout rate before the reference's classifier."""
    return theirs.model.dropout.p


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, 0.1),
        ({"hidden_dropout": 0.3}, 0.3),
        ({"classifier_dropout": 0.2, "hidden_dropout": 0.3}, 0.2),
        ({"classifier_dropout": 0.0, "hidden_dropout": 0.3}, 0.0),
    ],
)
def test_token_classifier_has_the_dropout_rate_of_transformers(rates, expected, tmp_path):
    ours, theirs = pair("token", small_config(num_hidden_layers=1, **rates), tmp_path)
    assert ours.classifier_dropout == dropout_rate(theirs) == expected


def test_token_classifier_rejects_invalid_labels():
    model = Phi3ForTokenClassification(small_config(num_labels=5))
    ids = np.array([[5, 6], [7, 8]])
    with pytest.raises(ValueError, match=r"labels\[1, 0\] = 5; expected 0 to 4, or -100"):
        model(ids, labels=np.array([[0, -100], [5, 1]]))
    with pytest.raises(ValueError, match=r"labels is int\d+\[2\]; expected integers of shape \[2, 2\]"):
        model(ids, labels=np.array([0, 1]))


# Causal language model


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_logits_to_keep_matches_transformers(tied, tmp_path):
    config = small_config(tie_word_embeddings=tied)
    ours, theirs = pair("causal", config, tmp_path)
    ids = random_ids(config, np.ones((2, LENGTH), np.int64))
    mask = np.ones_like(ids)
    for keep in (0, 1, 3, LENGTH + 5):
        ref = run_theirs(theirs, ids, mask, logits_to_keep=keep).logits
        assert distance(run(ours, input_ids=ids, logits_to_keep=keep).logits, ref) <= TOLERANCE
    chosen = np.array([0, 7, 3])
    ref = run_theirs(theirs, ids, mask, logits_to_keep=chosen).logits
    assert distance(run(ours, input_ids=ids, logits_to_keep=chosen).logits, ref) <= TOLERANCE
    ref = run_theirs(theirs, ids, mask, logits_to_keep=2).logits
    assert distance(run(ours, input_ids=ids, num_logits_to_keep=2).logits, ref) <= TOLERANCE
    assert distance(run(ours, input_ids=ids, logits_to_keep=np.int64(2)).logits, ref) <= TOLERANCE
    each_row = np.array([[0, 7, 3], [5, 5, LENGTH - 1]])
    ref = run_theirs(theirs, ids, mask, logits_to_keep=each_row).logits
    assert distance(run(ours, input_ids=ids, logits_to_keep=each_row).logits, ref) <= TOLERANCE


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (np.array([0, 3]), r"logits_to_keep names position 3 of 3 tokens"),
        (np.array([True, False, True]), r"logits_to_keep is bool\[3\]; expected a number, or integers"),
        (np.array([[0], [1]]), r"logits_to_keep is int\d+\[2, 1\]; .* of shape \[kept\] or \[1, kept\]"),
    ],
)
def test_rejects_invalid_logits_to_keep(keep, message):
    with pytest.raises(ValueError, match=message):
        Phi3ForCausalLM(small_config(num_hidden_layers=1))(np.array([[5, 6, 7]]), logits_to_keep=keep)


def test_causal_lm_rejects_invalid_labels():
    model = Phi3ForCausalLM(small_config())
    ids = np.array([[5, 6], [7, 8]])
    with pytest.raises(ValueError, match=r"labels\[0, 1\] = 96; expected 0 to 95, or -100"):
        model(ids, labels=np.array([[5, 96], [7, 8]]))
    with pytest.raises(ValueError, match=r"expected integers of shape \[2, 2\]"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"expected integers of shape \[2, 2\]"):
        model(ids, labels=ids.astype(np.float32))
    with pytest.raises(ValueError, match=r"leave logits_to_keep at 0"):
        model(ids, labels=ids, logits_to_keep=1)


# Numbers of labels


@pytest.mark.parametrize("kind", ["causal", "token"])
def test_losses_of_micro_batches_add_up(kind, tmp_path):
    config = small_config(num_labels=5)
    ours, theirs = pair(kind, config, tmp_path)
    mask = padding_mask(4, LENGTH, "right")
    ids = random_ids(config, mask)
    labels = token_labels(mask, 5)
    counted = labels[:, 1:] if kind == "causal" else labels
    count = int((counted != -100).sum())
    ref = run_theirs(theirs, ids, mask, labels=labels, gradients=True)
    given = run_theirs(theirs, ids, mask, labels=labels, num_items_in_batch=np.array(count))
    total, summed = 0.0, {}
    for rows in (slice(0, 2), slice(2, 4)):
        out, gradient = gradients(
            ours,
            input_ids=ids[rows],
            attention_mask=mask[rows],
            labels=labels[rows],
            num_items_in_batch=np.int32(count),
        )
        total += float(out.loss)
        summed = {name: summed.get(name, 0) + value for name, value in gradient.items()}
    assert distance(total, ref.loss) <= TOLERANCE
    assert distance(total, given.loss) <= TOLERANCE
    assert_same_gradients(summed, ref, TOLERANCE)


@pytest.mark.parametrize("kind", ["causal", "token", "sequence"])
def test_loss_is_zero_if_every_label_is_ignored(kind):
    classes = {
        "causal": Phi3ForCausalLM,
        "token": Phi3ForTokenClassification,
        "sequence": Phi3ForSequenceClassification,
    }
    model = classes[kind](small_config(num_labels=3))
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    labels = np.full(2 if kind == "sequence" else ids.shape, -100)
    out, gradient = gradients(model, input_ids=ids, labels=labels)
    assert out.loss == 0
    assert all((value == 0).all() for value in gradient.values())


@pytest.mark.parametrize("changes", [slow({}), {"sliding_window": 5, "tie_word_embeddings": True}])
def test_last_logits_match_transformers(changes, tmp_path):
    """For the last n logits, the last layer skips the other positions, with a cache and without."""
    config = small_config(**changes)
    ours, theirs = pair("causal", config, tmp_path)
    mask = padding_mask(3, 20, "left")
    token = mask.astype(bool)[..., None]
    ids = random_ids(config, mask)
    for keep in (1, 3, 20):
        ref = run_theirs(theirs, ids, mask, logits_to_keep=keep).logits

        @jax.jit
        def three_ways(model, cache, keep=keep):
            common = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": keep}
            with_states = model(**common, output_hidden_states=True)
            assert with_states.hidden_states[-1].shape[1] == 20
            return [
                each.logits for each in (model(**common), model(**common, past_key_values=cache), with_states)
            ]

        for logits in three_ways(ours, ours.init_cache(3, 32)):
            assert distance(logits, ref, token[:, -keep:]) <= TOLERANCE


def test_last_logits_cost_less():
    """The last layer computes nothing for positions whose logits are not kept."""

    def cost(keep):
        model = Phi3ForCausalLM(small_config(num_hidden_layers=1))
        ids = np.ones((1, 64), np.int32)
        run = jax.jit(lambda model: model(ids, logits_to_keep=keep).logits)
        return run.lower(model).compile().cost_analysis()["flops"]

    assert cost(1) < 0.5 * cost(64)
