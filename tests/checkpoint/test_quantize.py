"""Tests that weights are rounded, written in the format of compressed-tensors, and read again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_files import BFLOAT16, FLOAT8, FORMS, words, write_quantized
from reference import distance, run, small_config, write_random_model
from safetensors.numpy import load_file, save_file

from phi3_jax import CheckpointError, Phi3ForCausalLM
from phi3_jax.checkpoint import open_checkpoint, quantize_checkpoint
from phi3_jax.checkpoint.compressed_tensors import CompressedSource, compress, compressed_config, exact_dtype
from phi3_jax.checkpoint.safetensors import SafetensorsSource, write_tensors
from phi3_jax.errors import UserError
from phi3_jax.quantization import Quantization, StoredWeight, round_weight
from phi3_jax.quantization.product import round_rows

PROJECTIONS = ("qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight")


def assert_same(found: StoredWeight, expected: StoredWeight) -> None:
    """Checks every number."""
    assert found.form == expected.form
    for name in ("values", "scale", "zero", "order"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=name)


def random_stored(rng: np.random.Generator, *, bits: int = 4, groups: int = 3, **kinds: bool) -> StoredWeight:
    outputs, size = (int(each) for each in rng.integers(1, 40, 2))
    half = 2 ** (bits - 1)
    values: Any = rng.integers(-half, half, (outputs, groups * size)).astype(np.int8)
    if kinds.get("is_float"):
        values = rng.normal(0, 50, values.shape).astype(FLOAT8)
    scale = rng.normal(0, 1, (outputs, groups)).astype(BFLOAT16).astype(np.float32)
    zero = rng.integers(-half, half, scale.shape).astype(np.float32) if kinds.get("has_zero") else None
    order = None
    if kinds.get("has_order"):
        g_idx = rng.permutation(np.repeat(np.arange(groups), size))
        if (np.diff(g_idx) >= 0).all():
            g_idx = g_idx[::-1]
        order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return StoredWeight(values, scale, bits, zero, order, kinds.get("int8_activations", False))


class Weights:
    """Weights as a source, under the names of projections."""

    def __init__(self, weights: dict[str, StoredWeight], floats: dict[str, np.ndarray]):
        self.weights, self.floats = weights, floats
        self.reads: list[str] = []

    def names(self) -> list[str]:
        return [*self.weights, *self.floats]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].values.shape if name in self.weights else self.floats[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.floats[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self.floats[name]

    def form(self, name: str) -> Any:
        return self.weights[name].form if name in self.weights else None

    def read_quantized(self, name: str) -> StoredWeight:
        self.reads.append(name)
        return self.weights[name]


FLOATS = {
    "model.embed_tokens.weight": np.ones((8, 4), np.float16),
    "lm_head.weight": np.ones((8, 4), np.float16),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"bits": 8},
    {"groups": 1},
    {"bits": 8, "groups": 1, "has_zero": True},
    {"has_zero": True},
    {"bits": 8, "has_zero": True, "has_order": True},
    {"has_order": True},
    {"bits": 8, "groups": 1, "is_float": True},
    {"bits": 8, "groups": 1, "int8_activations": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_written_is_read(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Weights of other sizes have config groups of their own."""
    rng = np.random.default_rng(3)
    weights = {f"model.layers.{i}.mlp.down_proj.weight": random_stored(rng, **kind) for i in range(8)}
    source = Weights(weights, FLOATS)
    written = CompressedSource(source, lambda name: exact_dtype(weights[name].scale))
    write_tensors(written, tmp_path, "1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert source.reads == list(weights)
    config = small_config().to_dict() | {"quantization_config": compressed_config(source)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = open_checkpoint(tmp_path).source
    assert sorted(again.names()) == sorted(source.names())
    for name, expected in weights.items():
        assert_same(again.read_quantized(name), expected)
        assert again.dtype(name) == BFLOAT16


def test_words_of_a_small_weight() -> None:
    stored = StoredWeight(
        values=np.array([[-8, -7, -6, -5, -4, -3, -2, -1]], np.int8),
        scale=np.array([[0.5, -2.0]], np.float32),
        bits=4,
        zero=np.array([[-8, 7]], np.float32),
        order=np.array([1, 3, 5, 7, 0, 2, 4, 6], np.int32),
    )
    tensors = compress(stored)
    np.testing.assert_array_equal(tensors.pop("weight_packed"), words([[4, 0, 5, 1, 6, 2, 7, 3]], 4))
    np.testing.assert_array_equal(tensors.pop("weight_g_idx"), [1, 0] * 4)
    np.testing.assert_array_equal(tensors.pop("weight_zero_point"), [[0, 15]])
    np.testing.assert_array_equal(tensors.pop("weight_shape"), [1, 8])
    np.testing.assert_array_equal(tensors.pop("weight_scale"), stored.scale)
    assert not tensors


def test_scales_get_the_narrowest_dtype_that_holds_them() -> None:
    assert exact_dtype(np.array([0.5, 2.0**100], np.float32)) == BFLOAT16
    assert exact_dtype(np.array([1.0009765625], np.float32)) == np.float16
    assert exact_dtype(np.array([0.1], np.float32)) == np.float32
    assert exact_dtype(np.array([1.0009765625e10], np.float32)) == np.float32


def test_config_names_schemes() -> None:
    rng = np.random.default_rng(0)
    eight = StoredWeight(np.ones((4, 16), np.int8), np.ones((4, 1), np.float32), 8)
    four = StoredWeight(np.ones((4, 32), np.int8), np.ones((4, 2), np.float32), 4)
    one_group = StoredWeight(np.ones((4, 16), np.int8), np.ones((4, 1), np.float32), 4)
    only = compressed_config(Weights({"a.weight": four, "b.weight": one_group}, FLOATS))
    assert only["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert only["config_groups"]["group_0"]["weights"] == {
        "type": "int",
        "num_bits": 4,
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "actorder": None,
        "dynamic": False,
    }
    assert (only["format"], only["ignore"], len(only["config_groups"])) == ("pack-quantized", ["lm_head"], 1)
    floats = random_stored(rng, bits=8, groups=1, is_float=True)
    tied = {"model.embed_tokens.weight": eight, "a.weight": eight, "b.weight": floats}
    mixed = compressed_config(Weights(tied, {"norm.weight": np.ones(4, np.float32)}))
    assert (mixed["format"], mixed["ignore"]) == ("mixed-precision", ["lm_head"])
    assert [(group["targets"], group["format"]) for group in mixed["config_groups"].values()] == [
        (["model.embed_tokens", "a"], "pack-quantized"),
        (["b"], "float-quantized"),
    ]
    tied.pop("b.weight")
    same = compressed_config(Weights(tied, {}))["config_groups"]
    assert [group["targets"] for group in same.values()] == [["Linear", "Embedding"]]


def test_config_says_how_activations_are_rounded() -> None:
    """As vLLM and transformers read it; an embedding is of another group."""
    eight = random_stored(np.random.default_rng(0), bits=8, groups=1, int8_activations=True)
    only = compressed_config(Weights({"a.weight": eight}, FLOATS))
    group = only["config_groups"]["group_0"]
    assert (only["format"], group["format"], group["targets"]) == (
        "int-quantized",
        "int-quantized",
        ["Linear"],
    )
    assert (group["weights"]["strategy"], group["weights"]["symmetric"]) == ("channel", True)
    by_row = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    assert group["input_activations"] == by_row
    tied = {"model.embed_tokens.weight": replace(eight, int8_activations=False), "a.weight": eight}
    mixed = compressed_config(Weights(tied, {}))
    assert [(group["targets"], group["input_activations"]) for group in mixed["config_groups"].values()] == [
        (["model.embed_tokens"], None),
        (["a"], by_row),
    ]


# Whole checkpoints.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_random_model("causal", small_config(head_dim=16, tie_word_embeddings=True), folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int4:group_size=16",
        "int4:group_size=8,symmetric=false",
        "int8:symmetric=false,skip=none",
        "int8:activations=int8,skip=none",
    ],
)
def test_rounds_a_checkpoint(folder: Path, tmp_path: Path, text: str) -> None:
    done = []
    quantize_checkpoint(
        folder, tmp_path / "out", text, max_shard_size="5KB", report=lambda *numbers: done.append(numbers)
    )
    source, config = open_checkpoint(tmp_path / "out")
    original, own_config = open_checkpoint(folder)
    assert config == own_config.replace(extra=own_config.extra | {"dtype": "float32"})
    assert sorted(source.names()) == sorted(original.names())
    quantization = Quantization.parse(text)
    for name in original.names():
        if name.endswith(PROJECTIONS) or (text.endswith("none") and "embed" in name):
            expected = round_weight(original.read(name), quantization, name)
            assert_same(source.read_quantized(name), expected)
        else:
            assert source.form(name) is None
            np.testing.assert_array_equal(source.read(name), original.read(name))
    stored = [name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)]
    assert done == [(count + 1, len(stored)) for count in range(len(stored))]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    Phi3ForCausalLM.from_pretrained(tmp_path / "out")


def test_rounds_a_gguf_file(llama_file: Path, tmp_path: Path) -> None:
    """Its projections are fused first."""
    quantize_checkpoint(llama_file, tmp_path / "out", "int4:group_size=8")
    source, original = open_checkpoint(tmp_path / "out").source, open_checkpoint(llama_file).source
    assert sorted(source.names()) == sorted(original.names())
    name = "model.layers.0.self_attn.qkv_proj.weight"
    expected = round_weight(original.read(name), Quantization(bits=4, group_size=8), name)
    assert_same(source.read_quantized(name), expected)


def test_leaves_heads_and_writes_rows_of_zeros(tmp_path: Path) -> None:
    """A scale is never zero, by which readers may divide."""
    write_random_model("sequence", small_config(), tmp_path / "model")
    tensors = {
        name: each.copy() for name, each in load_file(tmp_path / "model" / "model.safetensors").items()
    }
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name][3] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    for text in ("int8", "int4:group_size=16", "int4:group_size=16,symmetric=false"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", text)
        source = open_checkpoint(tmp_path / "out").source
        assert source.form("score.weight") is None
        assert source.read_quantized(name).scale.all()
        np.testing.assert_array_equal(source.read(name)[3], np.zeros(48))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["score"]


def test_one_weight_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is read once, also where a shard ends within a weight."""
    reads = []
    read = SafetensorsSource.read

    def count(self: Any, name: str) -> np.ndarray:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", count)
    quantize_checkpoint(folder, tmp_path / "out", "int4:group_size=16", max_shard_size="1KB")
    assert sorted(reads) == sorted(open_checkpoint(folder).source.names())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "int4",
            r"model: model\.layers\.\d\..*\.weight has (48|80) inputs, which groups of 64 do not divide; use",
        ),
        ("int3", "quantization 'int3' is not known"),
        (
            "int8:skip=qkv_proj+o_proj+gate_up_proj+down_proj+embed_tokens+lm_head",
            "leaves all weights of .* as they are",
        ),
    ],
)
def test_rejects_what_cannot_be_rounded(folder: Path, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("model: ", f"{folder}: ")):
        quantize_checkpoint(folder, tmp_path / "out", text)
    assert not list(tmp_path.iterdir())


def test_rejects_sources_and_destinations(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        quantize_checkpoint(folder, folder)
    with pytest.raises(CheckpointError, match="the destination's name is empty"):
        quantize_checkpoint(folder, "")
    with pytest.raises(CheckpointError, match="is a file; name a directory"):
        quantize_checkpoint(folder, folder / "config.json")
    quantized = tmp_path / "quantized"
    write_quantized(quantized, FORMS["gptq"])
    with pytest.raises(CheckpointError, match=r"is quantized already; quantize the original, or make floats"):
        quantize_checkpoint(quantized, tmp_path / "out")
    tensors = {name: each.copy() for name, each in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = np.nan
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=rf"{broken}: .*down_proj\.weight has numbers that are not finite"):
        quantize_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The library whose format is written.


@pytest.mark.live
@pytest.mark.parametrize(("bits", "groups"), [(4, 3), (8, 1)])
@pytest.mark.parametrize("has_zero", [False, True])
def test_matches_the_compressor_of_the_library(bits: int, groups: int, has_zero: bool) -> None:
    import torch

    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    stored = random_stored(np.random.default_rng(bits), bits=bits, groups=groups, has_zero=has_zero)
    weights = quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=not has_zero,
        strategy="group" if groups > 1 else "channel",
        group_size=stored.values.shape[1] // groups if groups > 1 else None,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    tensors = {"weight": torch.tensor(stored.dequantize()), "weight_scale": torch.tensor(stored.scale)}
    if stored.zero is not None:
        tensors["weight_zero_point"] = torch.tensor(stored.zero).to(torch.int8)
    theirs = packing.PackedQuantizationCompressor.compress(tensors, scheme)
    ours = compress(stored)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)


@pytest.mark.live
@pytest.mark.parametrize("text", ["int8", "int4:group_size=16"])
def test_transformers_reads_what_is_written(folder: Path, tmp_path: Path, text: str) -> None:
    """Its logits are those of the same model with the dequantized weights."""
    pytest.importorskip("compressed_tensors")
    import torch
    import transformers

    quantize_checkpoint(folder, tmp_path / "out", text)
    source, config = open_checkpoint(tmp_path / "out")
    floats = {}
    for name in source.names():
        floats[name] = source.read_quantized(name).dequantize() if source.form(name) else source.read(name)
    config.save_pretrained(tmp_path / "floats")
    save_file(floats, tmp_path / "floats" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor(np.random.default_rng(1).integers(4, 96, (2, 9)))
    logits = []
    for path in (tmp_path / "out", tmp_path / "floats", folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids).logits.numpy())
    theirs, expected, original = logits
    np.testing.assert_allclose(theirs, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(original - expected).max() > 1e-2


@pytest.mark.live
def test_transformers_rounds_activations_as_we_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scales like ours and vLLM's: the library divides the largest number by 127.5, not by 127."""
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    import torch
    import transformers

    monkeypatch.setattr(helpers, "calculate_range", lambda *_: (torch.tensor(-127), torch.tensor(127)))
    quantize_checkpoint(folder, tmp_path / "out", "int8:activations=int8")
    ids = np.random.default_rng(1).integers(4, 96, (2, 9))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    ours, floats = (
        run(Phi3ForCausalLM.from_pretrained(tmp_path / "out", quantization=text), input_ids=ids).logits
        for text in (None, "none")
    )
    assert distance(ours, theirs) < 1e-5
    assert distance(floats, theirs) > 1e-2


@pytest.mark.live
def test_rounded_rows_match_the_library() -> None:
    """Its rounding, given the scales that vLLM has, too."""
    import torch

    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    x = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    integers, scale = (np.array(each) for each in round_rows(x))
    arguments = quantization.QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    theirs = forward.fake_quantize(torch.tensor(x), torch.tensor(scale), torch.zeros(5, 1), arguments)
    np.testing.assert_allclose(integers * scale, theirs.numpy(), rtol=1e-6)
