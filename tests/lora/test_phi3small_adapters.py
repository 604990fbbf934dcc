"""Adapters of Phi-3-small, whose `up_proj` has its rows in turns in files, against PEFT and the formula."""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from answers import stored
from flax import nnx
from phi3small import small_config
from reference import Reference, distance, on_mesh, pair, run
from reference import small_config as phi3_config
from safetensors.numpy import load_file, save_file

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3ForSequenceClassification
from phi3_jax.lora import add_lora, load_adapters, merge_lora, open_model, save_adapters, save_merged
from phi3_jax.lora.adapted import find_model, load_merged
from phi3_jax.model.quantizing import quantize_model
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.trainer import Trainer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SMALL = small_config(num_hidden_layers=1)
OWN = {"query_key_value": "self_attn", "dense": "self_attn", "up_proj": "mlp", "down_proj": "mlp"}
MODULES = {name: f"model.layers.0.{block}.{name}" for name, block in OWN.items()}
IDS = np.random.default_rng(0).integers(4, 96, (4, 29))


@stored(whole=True)
def merged_by_peft(theirs: Reference, settings: dict, seed: int) -> dict:
    """Returns what PEFT writes of random adapters on plain linear layers, and the weights that it merges."""
    import peft
    import torch

    weights = load_file(theirs.folder / "model.safetensors")
    root = torch.nn.Module()
    for name in MODULES.values():
        *parents, last = name.split(".")
        node = root
        for part in parents:
            if not hasattr(node, part):
                setattr(node, part, torch.nn.Module())
            node = getattr(node, part)
        values = {kind: torch.tensor(weights[f"{name}.{kind}"]) for kind in ("weight", "bias")}
        linear = torch.nn.Linear(*reversed(values["weight"].shape))
        linear.load_state_dict(values)
        setattr(node, last, linear)
    model = peft.get_peft_model(root, peft.LoraConfig(**settings))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.tensor(rng.normal(0, 0.2, parameter.shape)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, CONFIG).read_text())
        tensors = load_file(Path(folder, WEIGHTS))
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes sets in random order
    merged = model.merge_and_unload().state_dict()
    return {
        "config": json.dumps(config),
        "tensors": tensors,
        "merged": {name: x.numpy()[:, :8] for name, x in merged.items() if name.endswith("weight")},
    }


SETTINGS = {
    "all": {"target_modules": sorted(OWN)},
    "some": {"target_modules": ["query_key_value", "up_proj"], "use_rslora": True},
    "dora": {"target_modules": sorted(OWN), "use_dora": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_matches_peft(case, tmp_path):
    """Merged weights are those of PEFT in the checkpoint's layout, and biases do not change."""
    ours, theirs = pair("causal", SMALL, tmp_path / "base")
    answer = merged_by_peft(theirs, {"r": 2, "lora_alpha": 6, **SETTINGS[case]}, seed=0)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / CONFIG).write_text(answer["config"])
    save_file(answer["tensors"], tmp_path / "adapters" / WEIGHTS)
    adapted = load_adapters(ours, tmp_path / "adapters")
    save_adapters(adapted, tmp_path / "again", base_model="base")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == answer["tensors"].keys()
    for name, tensor in answer["tensors"].items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    merge_lora(adapted).save_pretrained(tmp_path / "merged")
    save_merged(adapted, tmp_path / "in one", "float32")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for folder in ("merged", "in one"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == base.keys()
        for name, weight in found.items():
            if name in answer["merged"]:
                assert distance(weight[:, :8], answer["merged"][name]) <= 1e-5, name
            else:
                np.testing.assert_array_equal(weight, base[name], err_msg=name)
    expected = run(Phi3ForCausalLM.from_pretrained(tmp_path / "merged"), input_ids=IDS).logits
    assert distance(run(adapted, input_ids=IDS).logits, expected) <= 1e-5
    assert distance(run(ours, input_ids=IDS).logits, expected) > 1e-2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    ours, _ = pair("causal", SMALL, folder)
    return folder, ours


def randomised(model):
    """Draws random adapters: a B of zeros would hide errors of A."""
    rng = np.random.default_rng(5)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.LoRAParam):
            value = leaf.get_value()
            drawn = rng.normal(0, 0.2, leaf.shape).astype(np.float32)
            leaf.set_value(jax.device_put(drawn, value.sharding))
    return model


def test_merged_weights_follow_the_formula(base, tmp_path):
    """W + alpha / r * B A, of the files alone."""
    folder, ours = base
    adapted = randomised(add_lora(ours, 3, alpha=5.0))
    save_adapters(adapted, tmp_path / "adapters", base_model=str(folder))
    merge_lora(adapted).save_pretrained(tmp_path / "merged")
    stored_weights, merged = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    pieces = load_file(tmp_path / "adapters" / WEIGHTS)
    assert len(pieces) == 8
    for name in MODULES.values():
        a, b = (pieces[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = stored_weights[f"{name}.weight"] + 5 / 3 * b @ a
        assert distance(merged[f"{name}.weight"], expected) <= 1e-6, name


@pytest.mark.parametrize("targets", [["qkv_proj", "gate_up_proj"], ["query_key_value", "up_proj"]])
def test_targets_have_two_names(base, tmp_path, targets):
    folder, ours = base
    adapted = add_lora(ours, 2, targets=targets)
    save_adapters(adapted, tmp_path, base_model=str(folder))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["query_key_value", "up_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    assert len(load_file(tmp_path / WEIGHTS)) == 4


def test_on_a_mesh(base, tmp_path):
    folder, ours = base
    adapted = randomised(add_lora(ours, 2, dora=True))
    save_adapters(adapted, tmp_path / "one", base_model=str(folder))
    several = load_adapters(on_mesh(ours, make_mesh("data=2,fsdp=2,tensor=2")), tmp_path / "one")
    up = several.model.layers[0].mlp.up_proj.adapter
    assert {shard.data.shape for shard in up.b[...].addressable_shards} == {(2, 40, 2)}
    assert {shard.data.shape for shard in up.magnitude[...].addressable_shards} == {(2, 40)}
    expected = run(adapted, input_ids=IDS).logits
    assert distance(run(several, input_ids=IDS).logits, expected) <= 1e-5
    save_adapters(several, tmp_path / "again", base_model=str(folder))
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor)


def test_a_step_trains_the_adapters_alone(base):
    import optax

    _, ours = base
    adapted = add_lora(ours, 2)
    trainer = Trainer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)
    state, losses = trainer.start(adapted), []
    for _ in range(3):
        state, metrics = trainer.step(state, {"input_ids": IDS, "labels": IDS})
        losses.append(float(metrics.loss))
    assert losses[0] > losses[1] > losses[2]
    before, after = (
        {".".join(map(str, keys)): leaf for keys, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        for model in (adapted, trainer.model(state))
    )
    assert before.keys() == after.keys()
    for name, leaf in after.items():
        is_adapter = isinstance(leaf, nnx.LoRAParam)
        assert np.array_equal(leaf[...], before[name][...]) != is_adapter, name


def test_beside_quantized_weights(base, tmp_path):
    folder, ours = base
    quantized = quantize_model(ours, "int8")
    adapted = randomised(add_lora(quantized, 2))
    save_adapters(adapted, tmp_path / "adapters", base_model=str(folder))
    paths = find_model(folder, tmp_path / "adapters", default=Path)
    loaded = load_merged(
        Phi3ForCausalLM, open_model(paths), paths.adapter, dtype="float32", quantization="int8"
    )
    expected = run(adapted, input_ids=IDS).logits
    assert distance(run(loaded, input_ids=IDS).logits, expected) <= 1e-6
    merged = load_merged(Phi3ForCausalLM, open_model(paths), paths.adapter, dtype="float32")
    assert 1e-4 < distance(run(merged, input_ids=IDS).logits, expected) < 0.1


def test_a_classifiers_adapter_brings_its_head(base, tmp_path):
    folder, _ = base
    model = Phi3ForSequenceClassification.from_pretrained(folder, num_labels=3)
    adapted = randomised(add_lora(model, 2))
    save_adapters(adapted, tmp_path, base_model=str(folder))
    checkpoint = open_model(find_model(None, tmp_path, default=Path))
    assert checkpoint.config.num_labels == 3
    loaded = load_merged(Phi3ForSequenceClassification, checkpoint, tmp_path, dtype="float32")
    expected = run(adapted, input_ids=IDS).logits
    assert distance(run(loaded, input_ids=IDS).logits, expected) <= 1e-5


def test_rejects_a_base_model_of_another_family(base, tmp_path):
    folder, ours = base
    save_adapters(add_lora(ours, 2), tmp_path, base_model=str(folder))
    phi3_config(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has model_type=phi3, and the base model .* has phi3small; give"
    ):
        open_model(find_model(None, tmp_path, default=Path))


def test_rejects_what_does_not_fit(base, tmp_path):
    folder, ours = base
    save_adapters(add_lora(ours, 2, targets=["dense"]), tmp_path, base_model=str(folder))
    config, pieces = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)

    def load(**changes):
        (tmp_path / CONFIG).write_text(json.dumps(config | changes))
        load_adapters(ours, tmp_path)

    names = "query_key_value, dense, up_proj, down_proj"
    with pytest.raises(CheckpointError, match=rf"names no projection.*expected some of {names} \("):
        load(target_modules=["qkv_proj"])
    with pytest.raises(CheckpointError, match="bias='all', but trained biases are not supported; merge"):
        load(bias="all")
    extra = "base_model.model.model.layers.0.mlp.{}.lora_A.weight"
    for name, says in (("up_proj", r"lora_A\.weight$"), ("gate_proj", f"here they are on {names}")):
        save_file(pieces | {extra.format(name): np.ones((2, 48), np.float32)}, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match=says):
            load()
