"""Tests that quantized checkpoints of other libraries are read, and that broken ones are refused by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantized_files import AWQ, FLOAT8, FORMS, compressed, read_tensors, write_quantized
from reference import distance, run
from safetensors.numpy import load_file, save_file

from phi3_jax import CheckpointError, Phi3Config, Phi3ForCausalLM, convert_checkpoint
from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.awq import awq_weight
from phi3_jax.checkpoint.gptq import gptq_weight
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint

QKV = "model.layers.1.self_attn.qkv_proj"
DOWN = "model.layers.0.mlp.down_proj"


# The layouts, by formula.


def test_awq_has_eight_outputs_in_a_word() -> None:
    """w = (q - z) s; the nibbles of a word, from the lowest, are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    found = awq_weight(
        np.array([[0x75316420], [0x00000001]], np.int32),  # two inputs
        np.array([[0x00000021]], np.int32),
        np.array([[1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.5]], np.float16),
    )
    expected = np.array([[0, 1], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [6, 0], [7, 0]], np.float32)
    expected -= np.array([1, 0, 2, 0, 0, 0, 0, 0], np.float32)[:, None]
    expected *= np.array([1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.5], np.float32)[:, None]
    np.testing.assert_array_equal(found.dequantize(), expected)
    assert (found.values.min(), found.values.max()) == (-8, -1)


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_has_eight_inputs_in_a_word(less_one: bool) -> None:
    """w = (q - z) s with the first input in the lowest bits; version 1 has zero points less one.

    The zero points are 0 to 7 from the lowest nibble; less one, the first borrows from the second.
    """
    qweight = np.tile(np.array([[0x76543210], [0x0000000F]], np.uint32).view(np.int32), 8)
    zeros = np.array([[0x76543210 - (0x11111111 if less_one else 0)]], np.int32)
    found = gptq_weight(qweight, zeros, np.full((1, 8), 0.5, np.float16), bits=4, less_one=less_one)
    inputs = np.array([*range(8), 15, *[0] * 7])
    np.testing.assert_array_equal(found.dequantize(), (inputs - np.arange(8)[:, None]) * 0.5)


def test_gptq_of_8_bits_has_four_inputs_in_a_word() -> None:
    qweight = np.tile(np.array([[0xFF800100]], np.uint32).view(np.int32), 4)
    zeros = np.array([[0x7F7F7F80]], np.int32)
    found = gptq_weight(qweight, zeros, np.full((1, 4), 2.0, np.float16), bits=8)
    expected = np.array([0, 1, 128, 255]) - np.array([129, 128, 128, 128])[:, None]
    np.testing.assert_array_equal(found.dequantize(), expected * 2.0)


# Whole checkpoints.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """Returns a function that writes a checkpoint of a form once, and returns it and its floats."""
    written: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    def write(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        if name not in written:
            folder = tmp_path_factory.mktemp("quantized")
            written[name] = folder, write_quantized(folder, FORMS[name], head_dim=16)
        return written[name]

    return write


@pytest.mark.parametrize("name", FORMS)
def test_reads_the_numbers_of_every_form(folders: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("phi3_jax.checkpoint.packing.BLOCK", 1)  # several blocks
    monkeypatch.setattr("phi3_jax.checkpoint.awq.BLOCK", 1)
    monkeypatch.setattr("phi3_jax.checkpoint.quantized.BLOCK", 1)
    folder, floats = folders(name)
    form = FORMS[name]
    source, config = open_checkpoint(folder)
    assert "quantization_config" not in config.extra
    assert sorted(source.names()) == sorted(floats)
    for tensor, expected in floats.items():
        assert source.shape(tensor) == expected.shape
        found = source.form(tensor)
        dtype = np.dtype(form.scales if found and form.scales != np.float32 else ml_dtypes.bfloat16)
        assert source.dtype(tensor) == dtype
        read = source.read(tensor)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, expected.astype(dtype))
        assert (found is not None) == tensor.endswith("_proj.weight")
        if found is None:
            continue
        stored = source.read_quantized(tensor)
        np.testing.assert_array_equal(stored.dequantize(), expected)
        groups = expected.shape[1] // (form.group_size or expected.shape[1])
        kinds = not form.symmetric, form.shuffled, form.is_float, form.int8_activations
        assert stored.form == found == (form.bits, groups, *kinds)
        assert stored.values.dtype == (FLOAT8 if form.is_float else np.int8)
        assert stored.values.flags.c_contiguous
        part = source.read_part(tensor, [slice(20, 41), slice(3, 5)], slice(7, 31))
        np.testing.assert_array_equal(part, np.concatenate([read[20:41], read[3:5]])[:, 7:31])


@pytest.mark.parametrize("name", ["awq", "gptq, sorted by importance", "pack-quantized", "fp8"])
def test_converts_to_floats(folders: Any, tmp_path: Path, name: str) -> None:
    folder, floats = folders(name)
    (folder / "quantize_config.json").write_text("{}")
    config = Phi3Config.from_pretrained(folder)  # has the settings
    convert_checkpoint(folder, tmp_path / "out", dtype="float32", config=config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == floats.keys()
    for tensor, expected in floats.items():
        dtype = open_checkpoint(folder).source.dtype(tensor)
        np.testing.assert_array_equal(written[tensor], expected.astype(dtype).astype(np.float32))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_another_config_keeps_the_quantized_weights(folders: Any, tmp_path: Path) -> None:
    folder, _ = folders("gptq")
    config = open_checkpoint(folder).config.replace(rope_theta=500.0)
    reconfigure_checkpoint(folder, tmp_path / "out", config)
    assert (tmp_path / "out" / "model.safetensors").samefile(folder / "model.safetensors")
    source, written = open_checkpoint(tmp_path / "out")
    assert written == config
    assert source.form(f"{QKV}.weight") == open_checkpoint(folder).source.form(f"{QKV}.weight")


@pytest.mark.parametrize("name", ["awq", "gptq, sorted by importance", "fp8"])
def test_a_model_computes_with_the_weights(folders: Any, tmp_path: Path, name: str) -> None:
    """Its logits are those of the model with the same floats."""
    folder, floats = folders(name)
    model = Phi3ForCausalLM.from_pretrained(folder, dtype="float32")
    assert model.model.layers[0].mlp.down_proj.weight.get_value().values.dtype != np.float32
    assert "quantization_config" not in model.config.extra
    model.config.save_pretrained(tmp_path)
    save_file(
        {tensor: each.astype(np.float32) for tensor, each in floats.items()}, tmp_path / "model.safetensors"
    )
    ids = np.random.default_rng(1).integers(4, 96, (2, 9))
    expected = run(Phi3ForCausalLM.from_pretrained(tmp_path), input_ids=ids).logits
    np.testing.assert_allclose(run(model, input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_rounds_activations_as_the_settings_say(folders: Any) -> None:
    """int8 and none name other forms."""
    folder, _ = folders("int-quantized")
    ids = np.random.default_rng(1).integers(4, 96, (2, 9))
    floats, own, weights = (
        Phi3ForCausalLM.from_pretrained(folder, dtype="float32", quantization=text)
        for text in ("none", None, "int8")
    )
    assert own.model.layers[0].mlp.down_proj.weight.get_value().int8_activations
    assert not weights.model.layers[0].mlp.down_proj.weight.get_value().int8_activations
    expected = run(floats, input_ids=ids).logits
    assert 1e-3 < distance(run(own, input_ids=ids).logits, expected) < 0.1


Tensors = dict[str, np.ndarray]


def changed(
    folder: Path,
    to: Path,
    tensors: Callable[[Tensors], object] = lambda _: None,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
) -> Path:
    """Writes a copy of a checkpoint with other tensors or another config."""
    to.mkdir()
    found = read_tensors(folder)
    tensors(found)
    save_file(found, to / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    config(content)
    (to / "config.json").write_text(json.dumps(content))
    return to


def test_older_key_and_notes(folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, floats = folders("int-quantized")

    def rename(config: dict[str, Any]) -> None:
        config["compression_config"] = config.pop("quantization_config")

    with caplog.at_level(logging.INFO):
        source, config = open_checkpoint(changed(folder, tmp_path / "copy", config=rename))
        open_checkpoint(folders("float-quantized")[0])
    assert "weights are read, activations are rounded to int8 (compressed-tensors, int-" in caplog.text
    assert "weights are read, activations stay floats (compressed-tensors, float-quantized)" in caplog.text
    assert "compression_config" not in config.extra
    own = Phi3Config.from_pretrained(source.path)
    Phi3ForCausalLM.from_pretrained(source.path, quantization="none", config=own).save_pretrained(
        tmp_path / "out"
    )
    assert open_checkpoint(tmp_path / "out").source.form(f"{QKV}.weight") is None
    np.testing.assert_array_equal(
        source.read_quantized(f"{QKV}.weight").dequantize(), floats[f"{QKV}.weight"]
    )


def test_reads_the_file_name_of_auto_gptq(folders: Any, tmp_path: Path) -> None:
    folder, _ = folders("gptq")
    copy = changed(folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-16g.safetensors")
    assert open_checkpoint(copy).source.names() == open_checkpoint(folder).source.names()
    (copy / "gptq_model-8bit-16g.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(copy)


def test_settings_of_some_modules_differ(folders: Any, tmp_path: Path) -> None:
    """Groups of modules, names left out by pattern, and tensors of caches."""
    folder, floats = folders("pack-quantized")
    other, _ = folders("int-quantized")
    eight_bits = read_tensors(other)

    def mix(tensors: Tensors) -> None:
        for name in list(tensors):
            if "down_proj" in name or name.startswith(QKV):
                del tensors[name]
        tensors |= {name: tensor for name, tensor in eight_bits.items() if "down_proj" in name}
        tensors[f"{QKV}.weight"] = floats[f"{QKV}.weight"]
        tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)

    def settings(config: dict[str, Any]) -> None:
        group = compressed("int-quantized", num_bits=8)["config_groups"]["group_0"]
        group |= {"targets": ["re:.*down_proj"], "format": "int-quantized"}
        config["quantization_config"]["config_groups"]["group_1"] = group
        config["quantization_config"] |= {
            "ignore": ["lm_head", r"re:model\.layers\.1\.self_attn\.qkv.*"],
            "kv_cache_scheme": {"num_bits": 8},
        }

    source = open_checkpoint(changed(folder, tmp_path / "copy", mix, settings)).source
    assert sorted(source.names()) == sorted(floats)
    assert source.form(f"{QKV}.weight") is None
    bits = {name: form.bits for name in source.names() if (form := source.form(name)) is not None}
    assert {bits[name] for name in bits if "down_proj" in name} == {8}
    assert {bits[name] for name in bits if "down_proj" not in name} == {4}


def test_gptq_of_some_modules(folders: Any, tmp_path: Path) -> None:
    """`dynamic` leaves out modules by a pattern; others that are not quantized need not be listed."""
    folder, floats = folders("gptq")

    def replace(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith((DOWN, QKV))]:
            del tensors[name]
        tensors |= {f"{module}.weight": floats[f"{module}.weight"] for module in (DOWN, QKV)}

    def settings(config: dict[str, Any]) -> None:
        config["quantization_config"]["dynamic"] = {
            r"-:.*layers\.0\.mlp\.down": {},
            r"+:.*o_proj": {"desc_act": True},
        }

    source = open_checkpoint(changed(folder, tmp_path / "copy", replace, settings)).source
    assert [source.form(f"{module}.weight") for module in (DOWN, QKV)] == [None, None]
    assert len([name for name in source.names() if source.form(name)]) == 6


# Projections apart.

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PARTS = {
    "self_attn.qkv_proj": {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "self_attn.v_proj": 32},
    "mlp.gate_up_proj": {"mlp.gate_proj": 80, "mlp.up_proj": 80},
}


def as_llama(folder: Path, to: Path, change: Callable[[Tensors], object] = lambda _: None) -> Path:
    """Writes the checkpoint with its fused projections stored apart."""
    apart: Tensors = {}
    for name, tensor in read_tensors(folder).items():
        fused = next((fused for fused in PARTS if fused in name), None)
        if fused is None:
            apart[name] = tensor
            continue
        kind, start = name.rpartition(".")[2], 0
        for part, outputs in PARTS[fused].items():
            axis = 1 if kind in ("qweight", "qzeros", "scales") else 0
            count = outputs // 8 if kind == "qzeros" else outputs
            if kind == "weight_shape":
                piece = np.array([outputs, 48])
            elif kind == "g_idx":
                piece = tensor
            else:
                piece = tensor.take(range(start, start + count), axis)
            apart[name.replace(fused, part)] = piece
            start += count
    change(apart)
    to.mkdir()
    save_file(apart, to / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (to / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": settings}))
    return to


@pytest.mark.parametrize("name", ["gptq, sorted by importance", "pack-quantized", "int-quantized"])
def test_projections_apart_become_one(folders: Any, tmp_path: Path, name: str) -> None:
    folder, floats = folders(name)
    source = open_checkpoint(as_llama(folder, tmp_path / "llama")).source
    assert sorted(source.names()) == sorted(floats)
    for tensor in (f"{QKV}.weight", "model.layers.0.mlp.gate_up_proj.weight"):
        fused = open_checkpoint(folder).source
        assert source.form(tensor) == fused.form(tensor)
        stored = source.read_quantized(tensor)
        assert stored.form == source.form(tensor)
        np.testing.assert_array_equal(stored.dequantize(), floats[tensor])
        np.testing.assert_array_equal(source.read(tensor), fused.read(tensor))


def test_rejects_projections_apart_in_different_forms(folders: Any, tmp_path: Path) -> None:
    folder, floats = folders("gptq, sorted by importance")
    key, query = (f"model.layers.1.self_attn.{name}_proj" for name in "kq")

    def reorder(tensors: Tensors) -> None:
        tensors[f"{key}.g_idx"] = np.roll(tensors[f"{key}.g_idx"], 1)

    def unquantize(tensors: Tensors) -> None:
        for kind in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{key}.{kind}"]
        tensors[f"{key}.weight"] = floats[f"{QKV}.weight"][64:96]

    says = (
        rf"{query}.weight, {key}.weight, .* are quantized {{}}, .* one quantized {QKV}.weight; `phi3-jax conv"
    )
    source = open_checkpoint(as_llama(folder, tmp_path / "orders", reorder)).source
    with pytest.raises(CheckpointError, match=says.format("with their inputs in different orders")):
        source.read_quantized(f"{QKV}.weight")
    source = open_checkpoint(as_llama(folder, tmp_path / "forms", unquantize)).source
    with pytest.raises(CheckpointError, match=says.format("in different forms")):
        source.form(f"{QKV}.weight")
    np.testing.assert_array_equal(source.read(f"{QKV}.weight")[64:96], floats[f"{QKV}.weight"][64:96])


# Bad input.


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[Tensors], np.ndarray]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(change(tensors)))


def entry(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(fields)


def as_is(_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "tensors", "config", "says"),
    [
        ("awq", drop(f"{QKV}.qzeros"), as_is, rf"{QKV}\.qweight needs {QKV}\.qzeros, which is missing"),
        ("awq", drop(f"{QKV}.scales"), as_is, rf"needs {QKV}\.scales"),
        (
            "awq",
            put(f"{QKV}.scales", lambda t: t[f"{QKV}.scales"][:2]),
            as_is,
            rf"{QKV}\.scales has shape \[2, 128\], expected \[3, 128\]",
        ),
        (
            "gptq",
            put(f"{QKV}.qweight", lambda t: t[f"{QKV}.qweight"].astype(np.int64)),
            as_is,
            rf"{QKV}\.qweight has dtype int64, expected int32",
        ),
        (
            "gptq",
            put(f"{QKV}.qzeros", lambda t: t[f"{QKV}.qzeros"].astype(np.float32)),
            as_is,
            rf"{QKV}\.qzeros has dtype float32, expected int32",
        ),
        (
            "gptq",
            put(f"{QKV}.g_idx", lambda t: t[f"{QKV}.g_idx"][:-1]),
            as_is,
            r"g_idx has shape \[47\], expected \[48\]",
        ),
        ("gptq", put(f"{QKV}.qweight", lambda t: t[f"{QKV}.qweight"][0]), as_is, "expected rows and columns"),
        ("gptq", as_is, entry(bits=8), r"has (24|40) inputs, which the groups"),
        (
            "gptq",
            as_is,
            entry(group_size=32),
            r"has (48|80) inputs, which the groups .* do not divide: group_size=32",
        ),
        (
            "pack-quantized",
            put(f"{QKV}.weight_packed", lambda t: t[f"{QKV}.weight_packed"][:, 1:]),
            as_is,
            r"weight_packed has shape \[128, 5\], which does not fit the weight's shape \[128, 48\] and 4",
        ),
        (
            "pack-quantized with zero points",
            put(f"{QKV}.weight_zero_point", lambda t: t[f"{QKV}.weight_zero_point"][1:]),
            as_is,
            r"weight_zero_point has shape \[15, 3\], expected \[16, 3\]",
        ),
        (
            "pack-quantized with zero points",
            drop(f"{QKV}.weight_zero_point"),
            as_is,
            "zero_point, which is missing",
        ),
        (
            "pack-quantized",
            put(f"{QKV}.weight_scale", lambda t: t[f"{QKV}.weight_scale"].astype(np.float64)),
            as_is,
            "has dtype float64, expected float16 or bfloat16 or float32",
        ),
        ("int-quantized", drop(f"{QKV}.weight_scale"), as_is, "weight_scale, which is missing"),
        (
            "float-quantized",
            put(f"{QKV}.weight", lambda t: np.ones((128, 48), np.int8)),
            as_is,
            "has dtype int8, expected float8_e4m3fn",
        ),
        # Tensors and settings that contradict each other.
        (
            "int-quantized",
            put(f"{DOWN}.weight", lambda t: np.ones((48, 80), np.float32)),
            lambda config: config["quantization_config"]["ignore"].append(DOWN),
            rf"{DOWN}\.weight_scale has scales, but {DOWN}\.weight is not quantized",
        ),
        (
            "int-quantized",
            as_is,
            entry(ignore=["re:.*down_proj"]),
            r"down_proj\.weight is quantized, but .* leave it",
        ),
        (
            "float-quantized",
            lambda t: [
                t.pop(f"{DOWN}.weight_scale"),
                t.update({f"{DOWN}.weight": np.ones((48, 80), np.float32)}),
            ],
            as_is,
            rf"{DOWN}\.weight has dtype float32, but the settings .* must be quantized",
        ),
        (
            "pack-quantized",
            as_is,
            lambda config: config.update(quantization_config=AWQ),
            r"weight_packed is not of this form \(awq\): expected qweight",
        ),
        (
            "awq",
            put(f"{QKV}.weight", lambda t: np.ones((128, 48), np.float32)),
            as_is,
            rf"{QKV}\.weight as well",
        ),
        (
            "awq",
            put("model.norm.qzeros", lambda t: np.ones(3, np.int32)),
            as_is,
            "belongs to no quantized weight",
        ),
        ("awq", put("qweight", lambda t: np.ones((8, 1), np.int32)), as_is, "belongs to no quantized weight"),
        ("awq", put("x.weight", lambda t: np.ones((3, 3), np.uint8)), as_is, "x.weight is not of this form"),
        (
            "awq",
            lambda t: [t.pop(name) for name in list(t) if "_proj" in name],
            as_is,
            "has quantization_config, but no tensor is quantized; remove the key",
        ),
        (
            "awq",
            as_is,
            lambda config: config.pop("quantization_config"),
            "config.json has no quantization_config",
        ),
        ("awq", as_is, lambda config: config.update(quantization_config=[]), "is a list; expected an object"),
    ],
)
def test_rejects_headers_that_do_not_fit(
    folders: Any, tmp_path: Path, name: str, tensors: Any, config: Any, says: str
) -> None:
    folder, _ = folders(name)
    copy = changed(folder, tmp_path / "copy", tensors, config)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(copy)
    assert str(caught.value).startswith(str(copy))
    assert "\n" not in str(caught.value)


def spoiled(kind: str, value: float, module: str = QKV) -> Callable[[Tensors], object]:
    """Returns a change of one number."""

    def change(tensors: Tensors) -> None:
        tensor = tensors[f"{module}.{kind}"]
        tensor.reshape(-1)[5 % tensor.size] = value

    return change


@pytest.mark.parametrize(
    ("name", "tensors", "says"),
    [
        ("awq", spoiled("scales", 0.0), rf"{QKV}\.scales has scales that are 0, infinite or NaN"),
        ("gptq", spoiled("scales", np.nan), "has scales that are 0"),
        ("pack-quantized", spoiled("weight_scale", np.inf), "has scales that are 0"),
        (
            "fp8",
            lambda t: t.update({f"{QKV}.weight_scale": np.array(0.0, np.float32)}),
            "has scales that are 0",
        ),
        ("gptq", spoiled("g_idx", 3), rf"{QKV}\.g_idx places input 5 in group 3; expected 0 to 2"),
        ("gptq", spoiled("g_idx", -1), "places input 5 in group -1"),
        ("gptq", lambda t: t[f"{QKV}.g_idx"].fill(-1), "places input 0 in group -1"),
        (
            "gptq, sorted by importance",
            lambda t: t[f"{QKV}.g_idx"].__setitem__(slice(0, 17), 1),
            "expected 16 in each",
        ),
        (
            "gptq, symmetric, with biases of zero",
            spoiled("bias", 0.5),
            rf"{QKV}\.bias has numbers other than 0",
        ),
        ("gptq, symmetric, with biases of zero", spoiled("qzeros", 0), "other zero points than 8"),
        ("gptq of 8 bits", spoiled("qzeros", 0), "other zero points than 128"),
        (
            "int-quantized",
            spoiled("weight_zero_point", 1),
            "other than 0, but quantization_config says symmetric",
        ),
        ("naive-quantized of 4 bits", spoiled("weight", 8), r"integers outside of 4 bits, -8 to 7"),
        ("float-quantized", spoiled("weight", np.nan), rf"{QKV}\.weight has numbers that are NaN"),
    ],
)
def test_rejects_broken_numbers(folders: Any, tmp_path: Path, name: str, tensors: Any, says: str) -> None:
    folder, _ = folders(name)
    source = open_checkpoint(changed(folder, tmp_path / "copy", tensors)).source
    for read in (source.read_quantized, source.read):
        with pytest.raises(CheckpointError, match=says) as caught:
            read(f"{QKV}.weight")
        assert str(caught.value).startswith(str(tmp_path / "copy" / "model.safetensors"))
    source.read_quantized(f"{DOWN}.weight")


@pytest.mark.parametrize(
    "name", ["gptq, symmetric, with biases of zero", "pack-quantized with zero points", "fp8"]
)
def test_any_header_is_read_or_refused(folders: Any, tmp_path: Path, name: str) -> None:
    """Each tensor of a weight is missing, empty, or of another shape or dtype."""
    folder, _ = folders(name)
    tensors = read_tensors(folder)
    refused = 0
    for tensor, array in tensors.items():
        if not tensor.startswith(QKV):
            continue
        flat = array.reshape(-1)
        for number, other in enumerate([None, flat, flat[:0], array[None], array.astype(np.float32)]):
            copy = tmp_path / f"{tensor} {number}"
            copy.mkdir()
            others = {each: tensors[each] for each in tensors if each != tensor}
            if other is not None:
                others[tensor] = other
            save_file(others, copy / "model.safetensors")
            (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
            try:
                source = open_checkpoint(copy).source
                for each in source.names():
                    source.read(each)
            except CheckpointError:
                refused += 1
    assert refused > 5
