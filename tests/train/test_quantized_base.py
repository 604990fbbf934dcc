"""Tests adapters that are trained on a quantized base model (QLoRA)."""

import jax
import numpy as np
import pytest
from flax import nnx
from phi3_jax.train.finetune import make_recipe
from phi3_jax.train.recipe import make_trainer, new_model, with_adapters
from reference import distance
from runs import run, settings_of

from phi3_jax import Phi3ForSequenceClassification
from phi3_jax.checkpoint import quantize_checkpoint
from phi3_jax.errors import UserError
from phi3_jax.lora import load_adapters
from phi3_jax.model.layers import QuantizedParam
from phi3_jax.model.quantizing import has_quantized_weights

INT4 = "int4:group_size=8"
ADAPTERS = {"trained": "lora", "lora_rank": 2, "learning_rate": 0.02}


@jax.jit
def logits(model, ids):
    return model(ids).logits


@pytest.mark.slow
def test_saves_adapters_and_the_floats_that_were_trained(folder, base):
    results = run(folder, base, **ADAPTERS, quantize=INT4)
    assert results is not None
    written = folder / "run"
    merged = Phi3ForSequenceClassification.from_pretrained(written)
    assert all(
        isinstance(node, nnx.Param) for _, node in nnx.iter_graph(merged) if isinstance(node, nnx.Variable)
    )
    plain = Phi3ForSequenceClassification.from_pretrained(base, config=merged.config, quantization=INT4)
    adapted = load_adapters(plain, written / "adapter")
    ids = np.arange(10, 18)[None]
    assert distance(logits(merged, ids), logits(adapted, ids)) <= 1e-5
    floats = Phi3ForSequenceClassification.from_pretrained(base, config=merged.config)
    other = load_adapters(floats, written / "adapter")
    assert distance(logits(merged, ids), logits(other, ids)) > 1e-3  # the base was rounded


def test_a_step_keeps_the_integers_and_the_scales_of_the_base(folder, base):
    recipe = make_recipe(settings_of(folder, base, **ADAPTERS, quantize=INT4, dtype="bfloat16"), None, None)
    trainer = make_trainer(recipe, with_adapters(new_model(recipe, None), recipe), None)
    weights = [
        leaf
        for leaf in jax.tree.leaves(
            trainer.state_shapes.frozen, is_leaf=lambda x: isinstance(x, QuantizedParam)
        )
        if isinstance(leaf, QuantizedParam)
    ]
    assert len(weights) == 8
    assert {weight.get_value().scale.dtype.name for weight in weights} == {"float32"}
    assert {weight.get_value().values.dtype.name for weight in weights} == {"uint8"}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (ADAPTERS, True),
        ({"trained": "head"}, True),
        ({"trained": "full"}, False),
        (ADAPTERS | {"use_dora": True}, False),
    ],
    ids=["lora", "head", "full", "dora"],
)
def test_quantized_weights_become_floats_if_they_are_trained(folder, base, tmp_path, caplog, changes, kept):
    quantize_checkpoint(base, tmp_path / "small", INT4)
    recipe = make_recipe(settings_of(folder, tmp_path / "small", **changes), None, None)
    with caplog.at_level("INFO", logger="phi3_jax"):
        model = with_adapters(new_model(recipe, None), recipe)
    assert has_quantized_weights(model) == kept
    assert any("quantized weights, which are trained as floats" in line for line in caplog.messages) != kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "int8"}, "quantize=int8 needs trained=lora or head"),
        ({"quantize": "int9", "trained": "lora"}, "quantization 'int9' is not known"),
    ],
)
def test_rejects_settings(folder, base, changes, message):
    with pytest.raises((UserError, ValueError), match=message):
        settings_of(folder, base, **changes)
