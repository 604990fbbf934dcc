"""Tests forward, gradients and caches divided over eight devices against one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from reference import (
    CLASSES,
    GROUPED,
    assert_same_leaves,
    distance,
    longrope,
    on_mesh,
    padding_mask,
    small_config,
)

from phi3_jax.cache import KVCache
from phi3_jax.cache.layer_cache import LayerCache
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.sharding import make_mesh

OTHERS = ("fsdp=8", "data=2,tensor=4", "data=2,context=4")
MESHES = ["fsdp=2,context=2,tensor=2", *(slow(mesh) for mesh in OTHERS)]
BATCH, LENGTH = 8, 24


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    mask = padding_mask(BATCH, LENGTH, "left")
    mask[4:] = padding_mask(5, LENGTH, "right")[1:]
    ids = np.where(mask, rng.integers(4, 96, (BATCH, LENGTH)), 3)
    return ids, mask


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["causal", *(slow(each) for each in ("sequence", "token"))])
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

    (expected_loss, expected_logits), expected_gradients = run(one)
    (loss, logits), gradients = run(several)
    assert distance(loss, expected_loss) <= 1e-5
    where = True if kind == "sequence" else mask.astype(bool)[..., None]
    assert distance(logits, expected_logits, where) <= 1e-5
    assert_same_leaves(gradients, expected_gradients, 2e-5)
    for weight, gradient in zip(jax.tree.leaves(several), jax.tree.leaves(gradients), strict=True):
        assert gradient.addressable_shards[0].data.shape == weight.addressable_shards[0].data.shape


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "kind",
    ["float", slow("int8"), slow("ring")],
)
def test_a_cache_filled_in_chunks_equals_one_device(kind, mesh, rows):
    """The chunks are a prefill, some that cross the devices' parts of the slots, and single tokens."""
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
            chunk_logits, cache = step(model, cache, ids[:, start:stop], mask[:, start:stop])
            logits.append(chunk_logits)
        return np.concatenate(logits, axis=1), cache

    expected, expected_cache = run(one)
    logits, cache = run(several)
    tolerance = 2e-2 if kind == "int8" else 1e-5  # a tiny error may change an int8 by 1
    assert distance(logits, expected, mask.astype(bool)[..., None]) <= tolerance
    np.testing.assert_array_equal(cache.tokens, expected_cache.tokens)
    assert cache.keys[0].shape == expected_cache.keys[0].shape
    if kind != "ring":
        part = jax.tree.leaves(cache.keys[0])[0].addressable_shards[0].data
        assert part.shape[2] == cache.max_length // make_mesh(mesh).shape["context"]


@pytest.mark.parametrize("mesh", [slow("data=2,tensor=4"), "fsdp=2,context=2,tensor=2"])
def test_cache_after_a_prefill_equals_one_device(mesh, rows):
    ids, mask = rows
    one = Phi3ForCausalLM(small_config(**GROUPED))
    several = on_mesh(one, make_mesh(mesh))
    prefill = jax.jit(lambda model: model(ids, mask, use_cache=True, logits_to_keep=2))
    expected, out = prefill(one), prefill(several)
    assert distance(out.logits, expected.logits, mask[:, -2:].astype(bool)[..., None]) <= 1e-5
    step = jax.jit(lambda model, cache: model(ids[:, :1], past_key_values=cache).logits)
    assert distance(step(several, out.past_key_values), step(one, expected.past_key_values)) <= 1e-5
    tokens = np.asarray(expected.past_key_values.mask)[:, None, :, None]
    for ours, theirs in zip(out.past_key_values.keys, expected.past_key_values.keys, strict=True):
        assert distance(ours, theirs, tokens) <= 1e-5


def test_writes_chunks_longer_than_the_slots_of_a_device():
    mesh = make_mesh("data=2,context=4")
    rng = np.random.default_rng(1)
    config = small_config(**GROUPED)
    new = jnp.asarray(rng.normal(size=(2, 4, 13, 12)), jnp.float32)
    cache = KVCache.create(config, 2, 16, jnp.float32, mesh=mesh)
    layer = jax.jit(lambda layer: layer.write(new, 2 * new, mesh))(cache.layer(0))
    np.testing.assert_array_equal(layer[0][:, :, :13], new)
    np.testing.assert_array_equal(layer[0][:, :, 13:], 0)
    empty = KVCache.create(config, 2, 16, jnp.float32, mesh=mesh)
    start = jnp.array([3, 1], jnp.int32)
    keys, values = jax.jit(lambda layer: layer.write(new, 2 * new, mesh))(
        LayerCache(empty.keys[0], empty.values[0], start, ring=False)
    )
    for row, at in enumerate((3, 1)):
        np.testing.assert_array_equal(keys[row, :, at : at + 13], new[row])
        np.testing.assert_array_equal(values[row, :, at : at + 13], 2 * new[row])
        np.testing.assert_array_equal(keys[row, :, :at], 0)


@pytest.mark.parametrize("spare", [0, 4, 8, 100])
def test_a_prefill_moves_keys_to_the_devices_of_their_slots(spare):
    """With more slots than tokens, a device holds other slots than the tokens that it computed."""
    mesh = make_mesh("data=2,context=4")
    new = jnp.asarray(np.random.default_rng(5).normal(size=(2, 4, 32, 12)), jnp.float32)
    cache = KVCache.create(small_config(**GROUPED), 2, 32 + spare, jnp.float32, mesh=mesh)
    keys, _ = jax.jit(lambda layer: layer.write(new, new, mesh))(cache.layer(0, prefill=True))
    assert keys.sharding.is_equivalent_to(cache.keys[0].sharding, 4)
    np.testing.assert_array_equal(keys[:, :, :32], new)
    np.testing.assert_array_equal(keys[:, :, 32:], 0)


def test_4d_masks_and_attentions_equal_one_device(rows):
    """XLA computes attention with 4-D masks, and attention whose probabilities are returned."""
    ids, _ = rows
    one = Phi3ForCausalLM(small_config(**GROUPED))
    several = on_mesh(one, make_mesh("data=2,context=2,tensor=2"))
    rng = np.random.default_rng(2)
    own = np.tril(rng.random((BATCH, 8, LENGTH, LENGTH)) < 0.8) | np.eye(LENGTH, dtype=bool)
    run = jax.jit(lambda model: model(ids, own, output_attentions=True, output_hidden_states=True))
    out, expected = run(several), run(one)
    assert distance(out.logits, expected.logits) <= 1e-5
    assert_same_leaves(out.attentions, expected.attentions)
    assert_same_leaves(out.hidden_states, expected.hidden_states)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "window"),
    [
        ("data=2,context=2,tensor=2", None),
        (None, None),
        (None, 100),
        ("data=2,context=2,tensor=2", 100),
    ],
)
def test_pallas_kernels_in_a_model_equal_xla(mesh, window):
    """Splash attention and the cache's kernel are interpreted; logits, gradients and a step are compared."""
    config = small_config(**GROUPED, max_position_embeddings=512, sliding_window=window)
    one = Phi3ForCausalLM(config.replace(original_max_position_embeddings=512))
    pallas = on_mesh(one, None if mesh is None else make_mesh(mesh))
    pallas.set_attn_implementation("pallas")
    one.set_attn_implementation("xla")
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(4, 96, (2, 256)), np.ones((2, 256), int)
    mask[1, :130] = 0  # longer than the window: some queries see no key
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

    gradients, logits, step_logits = run(pallas)
    expected_gradients, expected, expected_step = run(one)
    assert distance(logits, expected, mask.astype(bool)[..., None]) <= 1e-5
    assert distance(step_logits, expected_step) <= 1e-5
    assert_same_leaves(gradients, expected_gradients, 2e-5)


def test_gradients_of_the_cached_kernel_equal_xla():
    """The kernel has no gradient of its own, and takes that of XLA's attention."""
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

    assert_same_leaves(gradient(pallas), gradient(one))


def test_loads_a_checkpoint_with_an_implementation(tmp_path):
    Phi3ForCausalLM(small_config()).save_pretrained(tmp_path)
    model = Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation="pallas")
    assert {layer.self_attn.attn_implementation for layer in model.model.layers} == {"pallas"}
    with pytest.raises(ValueError, match="attn_implementation='eager' is not known"):
        Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")


def test_rejects_an_unknown_implementation():
    with pytest.raises(ValueError, match="attn_implementation='flash' is not known; use one of None, 'xla'"):
        Phi3ForCausalLM(small_config()).set_attn_implementation("flash")


def test_divides_a_resized_vocabulary():
    mesh = make_mesh("data=2,tensor=4")
    several = on_mesh(Phi3ForCausalLM(small_config(**GROUPED)), mesh)
    one = Phi3ForCausalLM(small_config(**GROUPED))
    with pytest.raises(ValueError, match="vocab_size=98 does not divide over tensor=4"):
        several.resize_token_embeddings(98)
    several.resize_token_embeddings(100)
    one.resize_token_embeddings(100)
    assert several.lm_head.weight[...].addressable_shards[0].data.shape == (25, 48)
    ids = np.arange(4, 20).reshape(2, 8)
    assert distance(several(ids).logits, one(ids).logits) <= 1e-5
