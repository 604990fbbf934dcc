"""Phi-3-small's checkpoints: every bit survives, and what does not fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf_files import write_gguf
from phi3small import formulas, small_config
from reference import Reference, distance, random_ids, run, write_random_model
from reference import small_config as phi3_config
from safetensors.numpy import load_file, save_file

from phi3_jax import (
    CheckpointError,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3Model,
    Phi3SmallConfig,
    Phi3SmallForCausalLM,
    Phi3SmallForSequenceClassification,
    Phi3SmallModel,
)
from phi3_jax.checkpoint.convert import convert_checkpoint
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint
from phi3_jax.checkpoint.safetensors import SafetensorsSource
from phi3_jax.errors import UserError
from phi3_jax.model.saving import ModelSource
from phi3_jax.parallel.sharding import make_mesh

CONFIG = small_config(num_hidden_layers=1)
LAYER = "model.layers.0"
SHORT, LONG = [1.0, 1.05, 1.3, 1.55, 1.9, 2.4], [1.1, 1.6, 3.2, 7.5, 19.0, 41.5]
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_random_model("causal", CONFIG, folder)
    return folder


def changed(folder: Path, to: Path, change: Callable[[Tensors], object]) -> Path:
    """Writes the checkpoint with other tensors."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    to.mkdir()
    save_file(stored, to / "model.safetensors")
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


def tensors(folder: Path) -> Tensors:
    """Returns the tensors of all files of a folder."""
    return {
        name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()
    }


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert (found[name].dtype, found[name].shape) == (each.dtype, each.shape), name
        assert found[name].tobytes() == each.tobytes(), name


@pytest.mark.parametrize("mesh", [None, "fsdp=2,context=2,tensor=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_survives(written: Path, tmp_path: Path, dtype: str, mesh: str | None) -> None:
    """From one file through a model to many files, and back to one."""
    convert_checkpoint(written, tmp_path / "first", dtype=dtype)
    divided = None if mesh is None else make_mesh(mesh)
    Phi3ForCausalLM.from_pretrained(tmp_path / "first", mesh=divided).save_pretrained(
        tmp_path / "many", max_shard_size="4KB"
    )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    model = Phi3SmallForCausalLM.from_pretrained(tmp_path / "many", mesh=divided)
    model.save_pretrained(tmp_path / "one")
    expected = tensors(tmp_path / "first")
    assert {each.dtype for each in expected.values()} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    for name in ("many", "one"):
        assert_same_bits(tensors(tmp_path / name), expected)
        found = json.loads((tmp_path / name / "config.json").read_text())
        assert found["architectures"] == ["Phi3SmallForCausalLM"]
        configs = [Phi3SmallConfig.from_pretrained(each) for each in (tmp_path / name, written)]
        assert configs[0].replace(extra={}) == configs[1].replace(extra={})


def test_rows_of_up_proj_take_turns(written: Path) -> None:
    """The parameter has gegelu's first operand and then its second one; the file has them in turns."""
    model = Phi3ForCausalLM.from_pretrained(written)
    stored, up = load_file(written / "model.safetensors"), model.model.layers[0].mlp.up_proj
    for kind, parameter in (("weight", up.weight), ("bias", up.bias)):
        rows = stored[f"{LAYER}.mlp.up_proj.{kind}"]
        np.testing.assert_array_equal(parameter[...], np.stack([rows[::2], rows[1::2]]))


def test_each_device_reads_its_own_parts(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices of `tensor` read halves of the heads and of gegelu's operands, each row once."""
    read: dict[str, int] = {}
    original = SafetensorsSource.read_part

    def count(self: Any, name: str, rows: Any, columns: slice) -> np.ndarray:
        part = original(self, name, rows, columns)
        read[name] = read.get(name, 0) + part.size
        return part

    monkeypatch.setattr(SafetensorsSource, "read_part", count)
    model = Phi3ForCausalLM.from_pretrained(written, mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    assert read == {name: each.size for name, each in load_file(written / "model.safetensors").items()}
    layer = model.model.layers[0]
    shapes = {
        "query_key_value": (layer.self_attn.query_key_value, (1, 4, 12, 24), (1, 4, 12)),
        "dense": (layer.self_attn.dense, (24, 1, 2, 12), (24,)),
        "up_proj": (layer.mlp.up_proj, (2, 40, 24), (2, 40)),
        "down_proj": (layer.mlp.down_proj, (24, 40), (24,)),
    }
    for name, (linear, weight, bias) in shapes.items():
        found = [
            {shard.data.shape for shard in each[...].addressable_shards}
            for each in (linear.weight, linear.bias)
        ]
        assert found == [{weight}, {bias}], name


# What does not fit.

UP, QKV = f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.query_key_value"


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda stored: stored.pop(name)


def put(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda stored: stored.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(f"{UP}.bias"), f"missing: {UP}.bias"),
        (drop(f"{QKV}.weight"), f"missing: {QKV}.weight"),
        (drop(f"{LAYER}.input_layernorm.bias"), f"missing: {LAYER}.input_layernorm.bias"),
        (drop("model.final_layernorm.bias"), "missing: model.final_layernorm.bias"),
        (put(f"{LAYER}.self_attn.q_proj.weight", 48, 48), f"unexpected: {LAYER}.self_attn.q_proj.weight"),
        (put("model.norm.weight", 48), "unexpected: model.norm.weight"),
        (put(f"{UP}.weight", 80, 48), rf"{UP}.weight has shape \[80, 48\], expected \[160, 48\]"),
        (put(f"{UP}.bias", 80), rf"{UP}.bias has shape \[80\], expected \[160\]"),
        (put(f"{QKV}.bias", 48), rf"{QKV}.bias has shape \[48\], expected \[96\]"),
    ],
)
def test_names_tensors_that_do_not_fit(written: Path, tmp_path: Path, change: Any, says: str) -> None:
    folder = changed(written, tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=f"does not fit Phi3SmallForCausalLM of its config.*{says}"):
        Phi3ForCausalLM.from_pretrained(folder)


def test_ignores_a_tied_head_and_buffers_of_rope(written: Path, tmp_path: Path) -> None:
    def add(stored: Tensors) -> None:
        stored["lm_head.weight"] = np.full((96, 48), 7, np.float32)
        stored[f"{LAYER}.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    folder = changed(written, tmp_path / "model", add)
    Phi3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), tensors(written))


def test_untied_heads_are_kept(tmp_path: Path) -> None:
    write_random_model("causal", CONFIG.replace(tie_word_embeddings=False), tmp_path / "model")
    Phi3ForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "out")
    assert "lm_head.weight" in tensors(tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), tensors(tmp_path / "model"))


def test_checkpoints_of_another_family(written: Path, tmp_path: Path) -> None:
    """A class of Phi-3's loads both families, and a class of Phi-3-small's its own."""
    assert type(Phi3ForCausalLM.from_pretrained(written)) is Phi3SmallForCausalLM
    write_random_model("causal", phi3_config(), tmp_path)
    with pytest.raises(UserError, match=r"takes a Phi3SmallConfig.* with 'phi3'; use Phi3ForCausalLM"):
        Phi3SmallForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"missing: model.final_layernorm.bias, .*unexpected: model"):
        Phi3ForCausalLM.from_pretrained(tmp_path)


def test_a_causal_checkpoint_loads_into_a_classifier(written: Path, tmp_path: Path) -> None:
    first, again, other = (
        Phi3ForSequenceClassification.from_pretrained(written, num_labels=3, rngs=seed) for seed in (1, 1, 2)
    )
    assert isinstance(first, Phi3SmallForSequenceClassification)
    scores = [np.asarray(model.score.weight[...]) for model in (first, again, other)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert scores[0].shape == (3, 48)
    assert 0.5 < scores[0].std() / CONFIG.initializer_range < 1.5
    assert np.abs(scores[0] - scores[2]).max() > 0.01
    first.save_pretrained(tmp_path)
    found = tensors(tmp_path)
    np.testing.assert_array_equal(found.pop("score.weight"), scores[0])
    assert_same_bits(found, tensors(written))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(first).__name__]


def test_a_model_without_a_head_loads_and_is_loaded(written: Path, tmp_path: Path) -> None:
    decoder = Phi3Model.from_pretrained(written)
    assert isinstance(decoder, Phi3SmallModel)
    decoder.save_pretrained(tmp_path)
    found = tensors(tmp_path)
    assert_same_bits({f"model.{name}": each for name, each in found.items()}, tensors(written))
    for model in (Phi3ForCausalLM.from_pretrained(tmp_path), Phi3Model.from_pretrained(tmp_path)):
        ids = random_ids(CONFIG, np.ones((1, 29), int))
        states = run(model.decoder, input_ids=ids).last_hidden_state
        assert distance(states, run(decoder, input_ids=ids).last_hidden_state) == 0


def test_rejects_a_gguf_file(written: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", {"x": np.ones((2, 32), np.float32)})
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"a\.gguf: config.json has model_type='phi3small', which llama"
    ):
        Phi3ForCausalLM.from_pretrained(tmp_path)


# Converting.


def longrope(original: int, **changes: Any) -> Phi3SmallConfig:
    entry = {"type": "su", "short_factor": SHORT, "long_factor": LONG} | changes
    config = Phi3SmallConfig.from_dict(
        CONFIG.to_dict() | {"original_max_position_embeddings": original, "rope_scaling": entry}
    )
    assert isinstance(config, Phi3SmallConfig)
    return config


@pytest.mark.parametrize("size", ["4KB", "1GB"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converts(written: Path, tmp_path: Path, dtype: str | None, size: str) -> None:
    """Names stay: `up_proj` is not a half of Llama's MLP here."""
    convert_checkpoint(written, tmp_path / "out", dtype=dtype, max_shard_size=size)
    expected = {name: each.astype(dtype or each.dtype) for name, each in tensors(written).items()}
    assert_same_bits(tensors(tmp_path / "out"), expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if size == "1GB" else 9)
    config = json.loads((written / "config.json").read_text())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == config | {"dtype": dtype or "float32"}


def test_converts_under_a_wrapper(written: Path, tmp_path: Path) -> None:
    def rename(stored: Tensors) -> None:
        for name in list(stored):
            stored[f"module.{name}"] = stored.pop(name)

    convert_checkpoint(changed(written, tmp_path / "model", rename), tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), tensors(written))


@pytest.mark.parametrize("changes", [{}, {"short_mscale": 1.3, "long_mscale": 1.2}])
def test_longrope_stays_when_converted_and_saved(tmp_path: Path, changes: dict[str, float]) -> None:
    """The config keeps its own spelling, and the model its numbers beyond the original window."""
    config = longrope(20, **changes)
    write_random_model("causal", config, tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "converted")
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "converted")
    model.save_pretrained(tmp_path / "saved")
    first, *others = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "converted", "saved")
    )
    for other in others:
        assert other["rope_scaling"] == first["rope_scaling"]
        assert other["original_max_position_embeddings"] == 20
    theirs = Reference("causal", config, tmp_path / "model")
    ids = random_ids(config, np.ones((1, 33), int))
    again = Phi3ForCausalLM.from_pretrained(tmp_path / "saved")
    assert distance(run(again, input_ids=ids).logits[0], formulas(theirs, [ids[0]]).logits[0]) <= 1e-5


@pytest.mark.parametrize(
    "entry",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
)
def test_other_ropes_are_written_as_longrope(tmp_path: Path, entry: dict[str, Any]) -> None:
    """With this family's keys and the same numbers, within the original window and beyond it."""
    config = CONFIG.replace(rope_scaling=entry, original_max_position_embeddings=32)
    write_random_model("causal", config, tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert found["type"] == "longrope"
    assert "attention_factor" not in found
    first, converted = (Phi3ForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out"))
    for length in (21, 45):
        ids = random_ids(config, np.ones((1, length), int))
        expected = run(first, input_ids=ids).logits
        assert distance(run(converted, input_ids=ids).logits, expected) <= 1e-5


def test_another_config_links_the_weights(written: Path, tmp_path: Path) -> None:
    reconfigure_checkpoint(written, tmp_path / "out", CONFIG.replace(rope_theta=77.0))
    assert (tmp_path / "out" / "model.safetensors").samefile(written / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_embedding_base"] == 77.0
    assert Phi3ForCausalLM.from_pretrained(tmp_path / "out").config.rope_theta == 77.0


def test_a_new_model_has_the_checkpoints_names(written: Path) -> None:
    source = ModelSource(Phi3SmallForCausalLM(CONFIG))
    assert {name: source.shape(name) for name in source.names()} == {
        name: each.shape for name, each in load_file(written / "model.safetensors").items()
    }
    projection = {"weight": 2, "bias": 1}
    assert {name.rpartition(".")[2] for name in source.names()} == set(projection)


def test_settings_change_under_their_own_names(written: Path) -> None:
    model = Phi3ForCausalLM.from_pretrained(written, ffn_dropout_prob=0.25, gegelu_limit=2.0)
    assert (model.config.resid_pdrop, model.model.layers[0].mlp.limit) == (0.25, 2.0)
    with pytest.raises(TypeError, match="gegelu"):
        Phi3Config().replace(gegelu_limit=2.0)
