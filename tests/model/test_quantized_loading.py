"""Tests that a checkpoint is rounded as it is loaded, before memory holds its floats."""

import jax
import numpy as np
import pytest
from reference import GROUPED, assert_same_leaves, on_mesh, small_config

from phi3_jax import Phi3ForCausalLM, Phi3ForTokenClassification, Quantization, make_mesh
from phi3_jax.checkpoint.safetensors import SafetensorsSource
from phi3_jax.errors import UserError
from phi3_jax.model import quantize_model
from phi3_jax.model.layers import QuantizedParam
from phi3_jax.model.loading import load_abstract

TEXTS = ["int8", "int4:group_size=8,skip=none", "int4:group_size=8,symmetric=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    Phi3ForCausalLM(small_config(**GROUPED, num_hidden_layers=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mesh", [None, "fsdp=2,context=2,tensor=2"])
@pytest.mark.parametrize("text", TEXTS)
def test_loads_what_quantize_model_makes(folder, text, mesh):
    where = None if mesh is None else make_mesh(mesh)
    loaded = Phi3ForCausalLM.from_pretrained(folder, quantization=text, mesh=where)
    whole = Phi3ForCausalLM.from_pretrained(folder)
    assert_same_leaves(loaded, quantize_model(whole if where is None else on_mesh(whole, where), text))
    shapes = load_abstract(Phi3ForCausalLM, folder, mesh=where, quantization=text)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(shapes), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if where is not None:
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_none_loads_floats(folder):
    loaded = Phi3ForCausalLM.from_pretrained(folder, quantization="none")
    assert_same_leaves(loaded, Phi3ForCausalLM.from_pretrained(folder))


def test_a_classifier_gets_a_head_of_floats(folder):
    model = Phi3ForTokenClassification.from_pretrained(folder, quantization=Quantization(), num_labels=3)
    assert isinstance(model.model.layers[0].mlp.down_proj.weight, QuantizedParam)
    assert model.score.weight.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "quantization 'int3' is not known"),
        (
            "int4",
            "down_proj has 80 inputs, which groups of 64 do not divide; use group_size=8 or 16 or",
        ),
        ("int4:group_size=48", "down_proj has 80 inputs, which groups of 48 do not divide"),
    ],
)
def test_rejects_before_anything_is_read(folder, monkeypatch, text, message):
    monkeypatch.setattr(SafetensorsSource, "read_part", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=message):
        Phi3ForCausalLM.from_pretrained(folder, quantization=text)


def test_names_the_argument_for_those_of_transformers(folder):
    with pytest.raises(UserError, match='pass quantization="int8" or "int4"'):
        Phi3ForCausalLM.from_pretrained(folder, load_in_8bit=True)
