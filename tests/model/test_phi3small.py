"""Tests Phi-3-small against its formulas in PyTorch: outputs, and the gradient of every parameter."""

import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from phi3small import formulas, small_config, visible_mask
from reference import (
    assert_same_gradients,
    distance,
    gradients,
    padding_mask,
    pair,
    random_ids,
    run,
)

from phi3_jax import Phi3ForCausalLM, Phi3SmallConfig, Phi3SmallForCausalLM
from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.errors import UserError
from phi3_jax.model.block_sparse import SparseBlocks
from phi3_jax.model.phi3small import gegelu

TOLERANCE = 1e-5
LENGTH = 53
"""No multiple of a block, and far beyond the nearest blocks."""

SHORT = [1.0, 1.05, 1.3, 1.55, 1.9, 2.4]
LONG = [1.1, 1.6, 3.2, 7.5, 19.0, 41.5]


def longrope(original: int, **changes):
    entry = {"type": "su", "short_factor": SHORT, "long_factor": LONG} | changes
    config = small_config(original_max_position_embeddings=original)
    return Phi3SmallConfig.from_dict(
        config.to_dict() | {"original_max_position_embeddings": original, "rope_scaling": entry}
    )


CASES = {
    "second layer dense": small_config(),
    "first two layers sparse": small_config(num_hidden_layers=3, dense_attention_every_n_layers=3),
    "all layers dense": small_config(dense_attention_every_n_layers=1),
    "all layers sparse": small_config(dense_attention_every_n_layers=None),
    "same for all heads": small_config(blocksparse_homo_head_pattern=True),
    "more strides than heads": small_config(blocksparse_vert_stride=9, blocksparse_num_local_blocks=1),
    "eight heads": small_config(num_attention_heads=8, num_key_value_heads=4),
    "one key head": small_config(num_key_value_heads=1),
    "blocks of 5": small_config(blocksparse_block_size=5, blocksparse_triton_kernel_block_size=5),
    "no muP": small_config(mup_use_scaling=False, mup_embedding_multiplier=None, mup_width_multiplier=None),
    "multipliers of 0": small_config(mup_embedding_multiplier=0.0, mup_width_multiplier=0.0),
    "no limit": small_config(gegelu_limit=None),
    "position scale": small_config(rope_position_scale=0.6),
    "untied": small_config(tie_word_embeddings=False),
    "longrope short": longrope(60),
    "longrope short with mscale": longrope(60, short_mscale=1.3, long_mscale=1.2),
    "longrope long": longrope(20),
    "longrope long with mscale": longrope(20, short_mscale=-1.0, long_mscale=1.2),
}

FEW = ("second layer dense", "eight heads", "longrope long with mscale")


def split(mask, values):
    """Returns the rows of `values` without padding."""
    return [row[own == 1] for row, own in zip(values, mask, strict=True)]


@pytest.mark.parametrize(
    ("case", "side"),
    [
        *((case, "left") if case in FEW else slow(case, "left") for case in CASES),
        ("second layer dense", "right"),
        slow("longrope long", "right"),
    ],
)
def test_matches_the_formulas(case, side, tmp_path):
    """Each row of a padded batch gives what the formulas give for it alone."""
    config = CASES[case]
    ours, theirs = pair("causal", config, tmp_path)
    assert isinstance(ours, Phi3SmallForCausalLM)
    mask = padding_mask(3, LENGTH, side)
    ids = random_ids(config, mask)
    is_predicted = (np.cumsum(mask, axis=1) > 1) & (np.arange(LENGTH) != 17)  # alone, nothing is before a row
    labels = np.where((mask == 1) & is_predicted, ids, -100)
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=labels)
    ref = formulas(theirs, split(mask, ids), split(mask, labels))
    for row, expected in enumerate(ref.logits):
        assert distance(out.logits[row][mask[row] == 1], expected) <= TOLERANCE
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert_same_gradients(ours_gradient, ref, TOLERANCE)


@pytest.mark.parametrize("length", [slow(1), slow(7), slow(8), 16, 17, slow(24), 25, slow(33)])
def test_matches_the_formulas_at_the_borders_of_blocks(length, tmp_path):
    config = small_config(dense_attention_every_n_layers=None)
    ours, theirs = pair("causal", config, tmp_path)
    ids = random_ids(config, np.ones((1, length), int))
    assert distance(run(ours, input_ids=ids).logits[0], formulas(theirs, [ids[0]]).logits[0]) <= TOLERANCE


def test_dummy_tokens_have_the_least_logit(tmp_path):
    config = small_config(vocab_size=100352, num_hidden_layers=1, hidden_size=16, intermediate_size=8)
    ours, theirs = pair("causal", config, tmp_path)
    ids = np.array([[5, 100255, 17, 100266, 99]])
    logits = np.asarray(run(ours, input_ids=ids).logits)
    expected = formulas(theirs, [ids[0]]).logits[0]
    hidden = logits[0] == np.finfo(np.float32).min
    assert hidden.sum(axis=-1).tolist() == [91] * 5
    assert [t for t in range(100256, 100352) if not hidden[0, t]] == [100257, 100261, 100262, 100263, 100266]
    assert distance(logits[0], expected) <= TOLERANCE
    assert distance(np.where(hidden, 0, logits[0])[:, :100256], logits[0][:, :100256]) == 0


def test_rejects_a_label_on_a_dummy_token():
    config = small_config(vocab_size=100352, num_hidden_layers=1, hidden_size=16, intermediate_size=8)
    model = Phi3SmallForCausalLM(config)
    with pytest.raises(UserError, match=r"labels\[0, 1\] = 100260 is the id of no token"):
        model(np.array([[4, 5]]), labels=np.array([[4, 100260]]))


# Two heads, two nearest blocks and a stride of three: the description's example, six blocks.
EXAMPLE = (
    ["#.....", "##....", ".##...", "..##..", "..###.", "..#.##"],
    ["#.....", "##....", ".##...", ".###..", ".#.##.", ".#..##"],
)


def test_pattern_of_the_worked_example():
    pattern = BlockPattern(size=1, local=2, stride=3, heads=2)
    positions = jnp.arange(6)[None]
    seen = SparseBlocks(positions, positions, jnp.asarray(pattern.shifts)[None], pattern).dense()[0]
    seen &= np.tri(6, dtype=bool)
    drawn = [["".join(".#"[int(x)] for x in row) for row in head] for head in np.asarray(seen)]
    assert drawn == [list(head) for head in EXAMPLE]


def published_pairs(length, head):
    """Returns the number of visible pairs of a query and a key, by the model's own sizes."""
    pattern = Phi3SmallConfig().block_pattern
    assert pattern is not None
    positions, total = jnp.arange(length)[None], 0
    shift = jnp.asarray(pattern.shifts)[None, head : head + 1]
    for start in range(0, length, 1024):
        queries = positions[:, start : start + 1024]
        seen = SparseBlocks(queries, positions, shift, pattern).dense()[0, 0]
        total += int((seen & (positions <= queries.T)).sum())
    return total


@pytest.mark.parametrize(
    ("length", "first", "last"),
    [
        (1025, 525_761, 525_825),
        (2048, 1_582_080, 1_639_424),
        (4096, 4_089_856, 4_261_888),
        slow(8192, 10_678_272, 11_079_680),
    ],
)
def test_visible_pairs_of_the_published_model(length, first, last):
    assert (published_pairs(length, 0), published_pairs(length, 7)) == (first, last)
    assert published_pairs(length, 8) == first


def test_published_heads_have_eight_patterns():
    pattern = Phi3SmallConfig().block_pattern
    assert pattern is not None
    assert pattern.dense_length == 1024
    assert pattern.shifts.tolist() == [*range(8)] * 4
    remote = [[b for b in range(5) if (b + shift + 1) % 8 == 0] for shift in pattern.shifts[:9]]
    assert remote == [[], [], [], [4], [3], [2], [1], [0], []]


def test_pattern_equals_the_formula_of_the_tests():
    config = small_config()
    pattern = config.block_pattern
    assert pattern is not None
    positions = jnp.arange(LENGTH)[None]
    shifts = jnp.asarray(pattern.shifts).reshape(2, 2)
    seen = SparseBlocks(positions, positions, shifts, pattern).dense()[0] & np.tri(LENGTH, dtype=bool)
    np.testing.assert_array_equal(seen, visible_mask(config.to_dict(), LENGTH))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(0.5, -0.25, 0.26279133), (25, 30, 420), (-3, -25, 0.34335488), (1, 0, 0.84579577)],
)
def test_gegelu(a, b, expected):
    assert float(gegelu(jnp.float32(a), jnp.float32(b), 20.0)) == pytest.approx(expected, rel=1e-6)


def test_gegelu_does_not_clip_infinity():
    assert gegelu(jnp.float32(jnp.inf), jnp.float32(0), 20.0) == jnp.inf
    assert gegelu(jnp.float32(1), jnp.float32(jnp.inf), 20.0) == jnp.inf


def test_has_the_published_number_of_parameters():
    from phi3_jax.model.abstract import abstract_model

    model = abstract_model(Phi3ForCausalLM, Phi3SmallConfig())
    assert model.num_parameters() == 7_392_272_384


def test_rejects_the_config_of_another_family():
    with pytest.raises(UserError, match="does not take a Phi3SmallConfig; use Phi3SmallForCausalLM"):
        Phi3ForCausalLM(small_config())


def test_rejects_a_4d_mask():
    model = Phi3SmallForCausalLM(small_config())
    with pytest.raises(UserError, match="block-sparse layers count blocks by the tokens of a 2-D mask"):
        model(np.array([[4, 5]]), np.ones((1, 1, 2, 2), bool))
