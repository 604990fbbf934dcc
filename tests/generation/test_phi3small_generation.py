"""Tests generation with Phi-3-small: every way to generate gives what a row gives alone."""

import numpy as np
import pytest
from marks import slow
from phi3small import small_config
from reference import on_mesh, pair, run

from phi3_jax.generation import prompts
from phi3_jax.model import quantize_model
from phi3_jax.parallel.sharding import make_mesh

LENGTHS = (53, 30, 41)
NEW = 14
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": [], "pad_token_id": 3, "do_sample": False}

LONGROPE = {
    "rope_scaling": {
        "rope_type": "phi3small",
        "short_factor": [1.0, 1.05, 1.3, 1.55, 1.9, 2.4],
        "long_factor": [1.1, 1.6, 3.2, 7.5, 19.0, 41.5],
        "long_mscale": 1.3,
    },
    "original_max_position_embeddings": 36,
}
"""The long list begins within the answers of the rows of 30 tokens, and before the others'."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small_config(tie_word_embeddings=False, **LONGROPE)
    return pair("causal", config, tmp_path_factory.mktemp("small"))[0]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(4, 96, length) for length in LENGTHS]


def batch(rows, side):
    """Returns ids and mask of the rows, padded on one side."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 3), np.zeros((len(rows), width), int)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


def alone(model, rows, **options):
    """Returns what each row gives by itself."""
    answers = [np.asarray(model.generate(row[None], **(OPTIONS | options)))[:, len(row) :] for row in rows]
    return np.concatenate(answers)


@pytest.fixture(scope="module")
def expected(model, rows):
    answers = alone(model, rows)
    assert len({tuple(answer) for answer in answers}) == len(rows)
    assert all(len(set(answer.tolist())) > 3 for answer in answers)
    return answers


def test_each_token_is_that_of_a_forward_without_a_cache(model, rows, expected):
    for row, answer in zip(rows, expected, strict=True):
        whole = np.concatenate([row, answer])[None, :-1]
        if len(row) < 36 < whole.shape[1]:
            continue  # the tokens before the switch see the short list
        best = np.asarray(run(model, input_ids=whole).logits[0, len(row) - 1 :]).argmax(-1)
        np.testing.assert_array_equal(best, answer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch(model, rows, expected, side):
    ids, mask = batch(rows, side)
    out = np.asarray(model.generate(ids, mask, **OPTIONS))[:, -NEW:] if side == "left" else None
    if out is None:
        sequences = np.asarray(model.generate(ids, mask, **OPTIONS))
        out = np.stack([row[row != 3][-NEW:] for row in sequences])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("chunk", [7, slow(16), slow(24)])
def test_prompts_in_chunks(model, rows, expected, chunk, monkeypatch):
    monkeypatch.setattr(prompts, "PREFILL_CHUNK", chunk)
    ids, mask = batch(rows, "left")
    np.testing.assert_array_equal(np.asarray(model.generate(ids, mask, **OPTIONS))[:, -NEW:], expected)


MODES = {
    "beams": {"num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 4},
    "int8 cache": {"cache_implementation": "quantized"},
}


@pytest.mark.parametrize("mode", [mode if mode == "drafts" else slow(mode) for mode in MODES])
def test_modes(model, rows, mode):
    ids, mask = batch(rows, "left")
    out = np.asarray(model.generate(ids, mask, **(OPTIONS | MODES[mode])))[:, -NEW:]
    np.testing.assert_array_equal(out, alone(model, rows, **MODES[mode]))


@pytest.mark.parametrize("quantization", [slow("int8"), slow("int4:group_size=16")])
def test_quantized_weights(model, rows, quantization):
    quantized = quantize_model(model, quantization)
    ids, mask = batch(rows, "left")
    out = np.asarray(quantized.generate(ids, mask, **OPTIONS))[:, -NEW:]
    np.testing.assert_array_equal(out, alone(quantized, rows))


@pytest.mark.parametrize("mesh", [slow("fsdp=2,context=2,tensor=2"), slow("data=4,tensor=2")])
def test_on_a_mesh(model, rows, expected, mesh):
    """Each device of `tensor` has one key/value head, whose two patterns differ from the other's."""
    ids, mask = batch([*rows, rows[0]], "left")
    several = on_mesh(model, make_mesh(mesh))
    out = np.asarray(several.generate(ids, mask, **OPTIONS))[:, -NEW:]
    np.testing.assert_array_equal(out, [*expected, expected[0]])
