"""Forward, gradients and caches divided over eight devices, against one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CLASSES, longrope, on_mesh, padding_mask, small_config

from phi3_jax.cache import KVCache
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.sharding import make_mesh

OTHERS = ("fsdp=8", "data=2,tensor=4", "data=2,context=4")
MESHES = ["fsdp=2,context=2,tensor=2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in OTHERS)]
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12}
BATCH, LENGTH = 8, 24


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    mask = padding_mask(BATCH, LENGTH, "left")[:, ::1]
    mask[4:] = padding_mask(5, LENGTH, "right")[1:]
    ids = np.where(mask, rng.integers(4, 96, (BATCH, LENGTH)), 3)
    return ids, mask


def close(ours, expected, tolerance=1e-5):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["causal", "sequence", "token"])
def test_loss_and_gradients_equal_one_device(kind, mesh, rows):
    ids, mask = rows
    config = small_config(**GROUPED, **longrope(), num_labels=3, sliding_window=9)
    one = CLASSES[kind][1](config)
    several = on_mesh(one, make_mesh(mesh))
    labels = {
        "causal": np.where(mask, ids, -100),
        "sequence": np.arange(BATCH) % 3,
        "token": np.where(mask, ids % 3, -100),
    }[kind]

    @jax.jit
    def run(model):
        def loss(model):
            out = model(ids, mask, labels=labels)
            return out.loss, out.logits

        return jax.value_and_grad(loss, has_aux=True)(model)

    (loss, logits), gradients = run(one)
    (ours, our_logits), our_gradients = run(several)
    close(ours, loss)
    where = slice(None) if kind == "sequence" else mask.astype(bool)
    close(np.asarray(our_logits)[where], np.asarray(logits)[where])
    for made, expected in zip(jax.tree.leaves(our_gradients), jax.tree.leaves(gradients), strict=True):
        close(made, expected, 2e-5)
    for weight, gradient in zip(jax.tree.leaves(several), jax.tree.leaves(our_gradients), strict=True):
        assert gradient.addressable_shards[0].data.shape == weight.addressable_shards[0].data.shape


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "kind",
    ["float", pytest.param("int8", marks=pytest.mark.slow), pytest.param("ring", marks=pytest.mark.slow)],
)
def test_a_cache_filled_in_pieces_equals_one_device(kind, mesh, rows):
    """A first prefill, chunks that cross the devices' parts, and single steps."""
    ids, mask = rows
    one = Phi3ForCausalLM(small_config(**GROUPED, sliding_window=9 if kind == "ring" else None))
    several = on_mesh(one, make_mesh(mesh))
    options = {"float": {}, "int8": {"dtype": "int8"}, "ring": {"sliding": True, "chunk": 8}}[kind]

    @partial(jax.jit, donate_argnames="cache")
    def step(model, cache, ids, mask):
        out = model(ids, mask, past_key_values=cache)
        return out.logits, out.past_key_values

    def run(model):
        cache, logits = model.init_cache(BATCH, 200, **options), []
        for start, stop in ((0, 8), (8, 13), (13, 21), (21, 22), (22, 23), (23, 24)):
            made, cache = step(model, cache, ids[:, start:stop], mask[:, start:stop])
            logits.append(made)
        return np.concatenate(logits, axis=1), cache

    expected, theirs = run(one)
    made, ours = run(several)
    seen = mask.astype(bool)
    close(made[seen], expected[seen], 2e-2 if kind == "int8" else 1e-5)  # int8: a rounding may tip
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    slots = None if kind == "ring" else "slots"
    assert ours.keys[0].shape == theirs.keys[0].shape
    share = dict(make_mesh(mesh).shape)
    if slots:
        first = jax.tree.leaves(ours.keys[0])[0].addressable_shards[0].data.shape
        assert first[2] == ours.max_length // share["context"]


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "fsdp=2,context=2,tensor=2"])
def test_a_first_prefill_leaves_the_cache_that_one_device_leaves(mesh, rows):
    ids, mask = rows
    one = Phi3ForCausalLM(small_config(**GROUPED))
    several = on_mesh(one, make_mesh(mesh))
    prefill = jax.jit(lambda model: model(ids, mask, use_cache=True, logits_to_keep=2))
    expected, made = prefill(one), prefill(several)
    ended_in_a_token = mask[:, -2:].astype(bool)
    close(made.logits[ended_in_a_token], expected.logits[ended_in_a_token])
    step = jax.jit(lambda model, cache: model(ids[:, :1], past_key_values=cache).logits)
    close(step(several, made.past_key_values), step(one, expected.past_key_values))
    for ours, theirs in zip(made.past_key_values.keys, expected.past_key_values.keys, strict=True):
        held = np.asarray(expected.past_key_values.mask)[:, None, :, None]
        close(ours * held, theirs * held)


def test_writes_that_miss_a_part_or_span_all_of_it():
    """A chunk longer than a device's part of the cache lands whole."""
    mesh = make_mesh("data=2,context=4")
    rng = np.random.default_rng(1)
    config = small_config(**GROUPED)
    new = jnp.asarray(rng.normal(size=(2, 4, 13, 12)), jnp.float32)
    cache = KVCache.create(config, 2, 16, jnp.float32, mesh=mesh)
    layer = jax.jit(lambda layer: layer.write(new, 2 * new, mesh))(cache.layer(0))
    np.testing.assert_array_equal(layer[0][:, :, :13], new)
    np.testing.assert_array_equal(layer[0][:, :, 13:], 0)
    moved = KVCache.create(config, 2, 16, jnp.float32, mesh=mesh)
    start = jnp.array([3, 1], jnp.int32)
    keys, values = jax.jit(lambda layer: layer.write(new, 2 * new, mesh))(
        type(moved.layer(0))(moved.keys[0], moved.values[0], start, False)
    )
    for row, at in enumerate((3, 1)):
        np.testing.assert_array_equal(keys[row, :, at : at + 13], new[row])
        np.testing.assert_array_equal(values[row, :, at : at + 13], 2 * new[row])
        np.testing.assert_array_equal(keys[row, :, :at], 0)


@pytest.mark.parametrize("spare", [0, 4, 8, 100])
def test_a_first_prefill_fills_slots_divided_otherwise(spare):
    """More slots than tokens: every device but the first begins with others than those it computed."""
    mesh = make_mesh("data=2,context=4")
    new = jnp.asarray(np.random.default_rng(5).normal(size=(2, 4, 32, 12)), jnp.float32)
    cache = KVCache.create(small_config(**GROUPED), 2, 32 + spare, jnp.float32, mesh=mesh)
    keys, _ = jax.jit(lambda layer: layer.write(new, new, mesh))(cache.layer(0, prefill=True))
    assert keys.sharding.is_equivalent_to(cache.keys[0].sharding, 4)
    np.testing.assert_array_equal(keys[:, :, :32], new)
    np.testing.assert_array_equal(keys[:, :, 32:], 0)


def test_outputs_and_masks_of_a_users_own(rows):
    """Attention weights, hidden states and 4-D masks go through XLA on a mesh, with the same numbers."""
    ids, _ = rows
    one = Phi3ForCausalLM(small_config(**GROUPED))
    several = on_mesh(one, make_mesh("data=2,context=2,tensor=2"))
    rng = np.random.default_rng(2)
    own = np.tril(rng.random((BATCH, 8, LENGTH, LENGTH)) < 0.8) | np.eye(LENGTH, dtype=bool)
    run = jax.jit(lambda model: model(ids, own, output_attentions=True, output_hidden_states=True))
    made, expected = run(several), run(one)
    close(made.logits, expected.logits)
    wanted = expected.attentions + expected.hidden_states
    for ours, theirs in zip(made.attentions + made.hidden_states, wanted, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("mesh", "window"),
    [
        ("data=2,context=2,tensor=2", None),
        pytest.param(None, None, marks=pytest.mark.slow),
        pytest.param(None, 100, marks=pytest.mark.slow),
        pytest.param("data=2,context=2,tensor=2", 100, marks=pytest.mark.slow),
    ],
)
def test_pallas_kernels_within_the_model(mesh, window):
    """Splash attention and the cache's kernel, interpreted, against XLA: logits, gradients, a step."""
    config = small_config(**GROUPED, max_position_embeddings=512, sliding_window=window)
    one = Phi3ForCausalLM(config.replace(original_max_position_embeddings=512))
    pallas = on_mesh(one, None if mesh is None else make_mesh(mesh))
    pallas.set_attn_implementation("pallas")
    one.set_attn_implementation("xla")
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(4, 96, (2, 256)), np.ones((2, 256), int)
    mask[1, :130] = 0  # longer than the window: some queries see nothing
    counted = mask * np.roll(mask, 1, axis=1)
    counted[:, 0] = 0
    labels = np.where(counted, ids, -100)

    @jax.jit
    def run(model):
        def loss(model):
            out = model(ids, mask, labels=labels)
            return out.loss, out.logits

        gradients, logits = jax.grad(loss, has_aux=True)(model)
        cache = model.init_cache(2, 512)
        cache = model(ids, mask, past_key_values=cache).past_key_values
        return gradients, logits, model(ids[:, :3], past_key_values=cache).logits

    made, expected = run(pallas), run(one)
    seen = mask.astype(bool)
    close(made[1][seen], expected[1][seen])
    close(made[2], expected[2])
    for ours, theirs in zip(jax.tree.leaves(made[0]), jax.tree.leaves(expected[0]), strict=True):
        close(ours, theirs, 2e-5)


def test_gradients_through_the_caches_kernel():
    """It has none of its own: they are XLA's."""
    one = Phi3ForCausalLM(small_config(**GROUPED))
    pallas = on_mesh(one, None)
    pallas.set_attn_implementation("pallas")
    ids = np.random.default_rng(4).integers(4, 96, (2, 10))

    @jax.jit
    def gradient(model):
        def loss(model):
            out = model(ids, past_key_values=model.init_cache(2, 128))
            return jnp.sum(jnp.square(out.logits))

        return jax.grad(loss)(model)

    for ours, theirs in zip(jax.tree.leaves(gradient(pallas)), jax.tree.leaves(gradient(one)), strict=True):
        close(ours, theirs)


def test_a_checkpoint_is_loaded_with_an_implementation(tmp_path):
    Phi3ForCausalLM(small_config()).save_pretrained(tmp_path)
    model = Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation="pallas")
    assert {layer.self_attn.attn_implementation for layer in model.model.layers} == {"pallas"}
    with pytest.raises(ValueError, match="attn_implementation='eager' is not known"):
        Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="attn_implementation='flash' is not known; use one of None, 'xla'"):
        Phi3ForCausalLM(small_config()).set_attn_implementation("flash")


def test_a_resized_vocabulary_is_divided_again():
    mesh = make_mesh("data=2,tensor=4")
    several = on_mesh(Phi3ForCausalLM(small_config(**GROUPED)), mesh)
    one = Phi3ForCausalLM(small_config(**GROUPED))
    with pytest.raises(ValueError, match="vocab_size=98 does not divide over tensor=4"):
        several.resize_token_embeddings(98)
    several.resize_token_embeddings(100)
    one.resize_token_embeddings(100)
    assert several.lm_head.weight[...].addressable_shards[0].data.shape == (25, 48)
    ids = np.arange(4, 20).reshape(2, 8)
    close(several(ids).logits, one(ids).logits)
