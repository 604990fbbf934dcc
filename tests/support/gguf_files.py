"""Writes small GGUF files with llama.cpp's own package."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.constants import TokenType

from phi3_jax.checkpoint.gguf import GGUFSource

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
    kinds: Mapping[str, Kind] = MappingProxyType({}),
) -> Path:
    """Writes a GGUF file of these tensors (llama.cpp's names); `extra` changes metadata, None removes a key.

    Without a `kind`, tensors keep their dtypes. `kinds` has those of other tensors.
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
    writer.data_alignment = metadata.get("general.alignment", writer.data_alignment)
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
        own = kinds.get(name, kind)
        if value.ndim == 1 or own in (None, Kind.F32):
            writer.add_tensor(name, value)
        elif own == Kind.F16:
            writer.add_tensor(name, value.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def tokenizer_source(
    tmp_path: Path, tokenizer: Mapping[str, object], architecture: str = "llama"
) -> GGUFSource:
    tensors = stored_layout(weights(fused=architecture == "phi3"))
    return GGUFSource(write_gguf(tmp_path / "a.gguf", architecture, tensors, tokenizer=tokenizer))
