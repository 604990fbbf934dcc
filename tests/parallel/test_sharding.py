"""Meshes from text, the table of axes, and sizes that do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from phi3_jax import Phi3Config, Phi3ForCausalLM, Phi3Model
from phi3_jax.model.abstract import abstract_cache, abstract_model
from phi3_jax.parallel.sharding import (
    AXES,
    FIELDS,
    RULES,
    check_divides,
    constrain,
    gather,
    make_mesh,
    parse_mesh,
    sharding,
    spec,
)


def test_makes_a_mesh_from_text():
    mesh = make_mesh("fsdp=4, tensor=2")
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert make_mesh({"tensor": 2, "data": -1}).shape["data"] == 4
    assert make_mesh("tensor=2", jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model=8", "'model' is not a mesh axis; use data, fsdp, context, tensor"),
        ("fsdp=4,fsdp=2", "'fsdp' is given twice"),
        ("fsdp", "fsdp='' is not a number"),
        ("fsdp=two", "fsdp='two' is not a number"),
        ("fsdp=0", "fsdp=0 must be positive"),
        ("fsdp=-1,tensor=-1", "only one axis"),
        ("fsdp=3", "needs 3 devices and there are 8; the sizes must multiply to 8"),
        ("tensor=3,fsdp=-1", "must multiply to 8"),
    ],
)
def test_rejects_a_wrong_mesh(text, words):
    with pytest.raises(ValueError, match="mesh") as error:
        make_mesh(text)
    assert words in str(error.value)


def test_parse_mesh():
    assert parse_mesh("fsdp=8,tensor=-1") == {"fsdp": 8, "tensor": -1}
    assert parse_mesh("") == {}


def test_rules_name_only_mesh_axes():
    for axis, names in RULES.items():
        names = (names,) if isinstance(names, str) else names or ()
        assert set(names) <= set(AXES)
        assert axis in FIELDS or not names


def test_every_parameter_has_axes_of_the_rules():
    model = abstract_model(
        Phi3ForCausalLM, Phi3Config.preset("phi-4-mini-instruct"), mesh=make_mesh("fsdp=8")
    )
    axes = set()
    jax.tree.map(lambda p: axes.update(p.axes), model, is_leaf=lambda x: hasattr(x, "axes"))
    assert {"vocab", "embed", "kv_heads", "mlp", "norm"} <= axes <= set(RULES)


@pytest.mark.parametrize(
    ("preset", "mesh", "words"),
    [
        (
            "phi-3-medium-4k-instruct",
            "tensor=4,fsdp=2",
            "num_key_value_heads=10 does not divide over tensor=4; use tensor=1, 2",
        ),
        (
            "smollm2-135m-instruct",
            "tensor=8",
            "num_key_value_heads=3 does not divide over tensor=8; use tensor=1, 3",
        ),
    ],
)
def test_rejects_sizes_that_do_not_divide_before_it_allocates(preset, mesh, words, monkeypatch):
    monkeypatch.setattr(jax.random, "normal", None)  # the first parameter would be drawn with it
    with pytest.raises(ValueError, match="does not divide") as error:
        Phi3ForCausalLM(Phi3Config.preset(preset), mesh=make_mesh(mesh))
    assert words in str(error.value)


def test_suggests_sizes_that_divide_every_dimension_on_the_axis():
    mesh = make_mesh("tensor=8")
    sizes = {"kv_heads": 12, "vocab": 90, "embed": 7}
    with pytest.raises(ValueError, match="does not divide") as error:
        check_divides(mesh, sizes)
    assert str(error.value) == (
        "num_key_value_heads=12 does not divide over tensor=8; use tensor=1, 2, 3, 6; "
        "vocab_size=90 does not divide over tensor=8; use tensor=1, 2, 3, 6"
    )
    with pytest.raises(
        ValueError, match=r"the batch=6 does not divide over data=2 x fsdp=4; use a multiple of 8"
    ):
        check_divides(make_mesh("data=2,fsdp=4"), {"batch": 6})


def test_rejects_a_batch_and_a_length_that_do_not_divide(small_model):
    model = small_model("fsdp=4,context=2")
    with pytest.raises(ValueError, match="the batch=3 does not divide over data=1 x fsdp=4"):
        model(np.ones((3, 8), int))
    with pytest.raises(ValueError, match=r"the sequence length=7 does not divide over context=2"):
        model(np.ones((4, 7), int))
    with pytest.raises(ValueError, match="the batch=3 does not divide"):
        model.init_cache(3, 16)


@pytest.fixture
def small_model():
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return lambda mesh: Phi3Model(config, mesh=make_mesh(mesh))


def test_new_parameters_and_caches_are_divided(small_model):
    model = small_model("fsdp=2,context=2,tensor=2")
    layer = model.layers[0]
    assert layer.self_attn.qkv_proj.weight[...].sharding.spec == spec("kv_heads", "qkv", "head_dim", "embed")
    assert layer.mlp.down_proj.weight[...].addressable_shards[0].data.shape == (16, 24)
    cache = model.init_cache(4, 9)
    assert cache.max_length == 10  # divides over context=2
    assert cache.keys[0].addressable_shards[0].data.shape == (2, 2, 5, 8)
    shapes = abstract_cache(model, 4, 9)
    assert shapes.keys[0].sharding.is_equivalent_to(cache.keys[0].sharding, 4)


def test_stacked_layers_are_not_divided():
    mesh = make_mesh("fsdp=8")
    assert sharding(mesh, ("mlp", "embed"), 3).spec == PartitionSpec(None, "tensor", "fsdp")


def test_the_gradient_of_a_gathered_parameter_is_scattered():
    """No device keeps the whole gradient: the sum is divided as the parameter is."""
    mesh = make_mesh("fsdp=8")
    weight = jax.device_put(jnp.ones((16, 24)), sharding(mesh, ("mlp", "embed")))
    x = jax.device_put(jnp.arange(8.0 * 24).reshape(8, 24), sharding(mesh, ("batch", "hidden")))

    def loss(weight, x):
        y = constrain(x, mesh, "batch", "hidden") @ gather(weight, mesh, ("mlp", "embed")).T
        return jnp.sum(jnp.square(y))

    gradient = jax.jit(jax.grad(loss))
    scattered = gradient(weight, x)
    assert scattered.addressable_shards[0].data.shape == (16, 3)
    np.testing.assert_allclose(
        scattered, jax.grad(lambda w: jnp.sum(jnp.square(x @ w.T)))(jnp.ones((16, 24)))
    )
    text = gradient.lower(weight, x).compile().as_text()
    assert text.count(" all-gather(") == 1
