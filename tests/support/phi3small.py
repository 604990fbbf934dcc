"""Phi-3-small's formulas in plain PyTorch, for rows without padding, and small configs of it.

Masks are dense, and nothing is cached or fused: each line is a formula of the model's description.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from answers import stored
from reference import Reference

from phi3_jax import Phi3SmallConfig


def small_config(**changes: Any) -> Phi3SmallConfig:
    """Returns a config of two layers, the second one dense, with blocks of 8 tokens.

    Up to 16 tokens, no key is hidden.
    """
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "blocksparse_block_size": 8,
        "blocksparse_triton_kernel_block_size": 8,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 3,
        "rope_theta": 500.0,
        "mup_attn_multiplier": 3.0,
        "mup_embedding_multiplier": 1.7,
        "mup_width_multiplier": 0.8,
        "gegelu_limit": 1.5,
    }
    return Phi3SmallConfig(**(settings | changes))


def visible(settings: dict[str, Any], head: int, query: int, key: int) -> bool:
    """Returns whether a head sees a key, by the positions of query and key."""
    size, stride = settings["blocksparse_block_size"], settings["blocksparse_vert_stride"]
    step = max(1, int(stride / settings["num_attention_heads"]))
    shift = 0 if settings["blocksparse_homo_head_pattern"] else head * step
    a, b = query // size, key // size
    is_local = a - b < settings["blocksparse_num_local_blocks"]
    return key <= query and (is_local or (b + shift + 1) % stride == 0)


def visible_mask(settings: dict[str, Any], length: int) -> np.ndarray:
    """Returns which keys each head sees, bool [heads, T, T]."""
    heads, positions = range(settings["num_attention_heads"]), range(length)
    return np.array([[[visible(settings, h, t, s) for s in positions] for t in positions] for h in heads])


@stored
def run_formulas(theirs: Reference, rows: list[np.ndarray], labels: list[np.ndarray] | None = None) -> Any:
    """Returns each row's last hidden states and logits; with labels also the loss and all gradients.

    A row is [T]; its labels are -100 where they do not count, and are shifted here. The mean is over the
    labels of all rows. For a classifier of rows, the logits are those of the last token, and labels [1].
    """
    import torch

    torch.set_num_threads(1)
    weights = _weights(theirs, requires_grad=labels is not None)
    settings = theirs.config.to_dict()
    kind = theirs.answer_key[2]
    hidden = [_decoder(weights, settings, torch.tensor(row)) for row in rows]
    logits = [_head(weights, settings, kind, x) for x in hidden]
    answer: dict[str, Any] = {
        "hidden": [x.detach().numpy() for x in hidden],
        "logits": [x.detach().numpy() for x in logits],
    }
    if labels is not None:
        total, count = torch.zeros(()), 0
        for x, own in zip(logits, map(torch.tensor, labels), strict=True):
            x, own = (x[:-1], own[1:]) if kind.endswith("CausalLM") else (x, own)
            total = total + torch.nn.functional.cross_entropy(x, own, ignore_index=-100, reduction="sum")
            count += int((own != -100).sum())
        loss = total / count
        loss.backward()
        answer["loss"] = loss.item()
        answer["gradients"] = {
            name: np.zeros(x.shape, np.float32) if x.grad is None else x.grad.numpy()
            for name, x in weights.items()
        }
    return answer


def formulas(theirs: Reference, rows: list[np.ndarray], labels: list[np.ndarray] | None = None) -> Any:
    """Returns the answer of `run_formulas` as a namespace."""
    return SimpleNamespace(**run_formulas(theirs, rows, labels))


def _weights(theirs: Reference, requires_grad: bool) -> dict[str, Any]:
    import torch
    from safetensors.numpy import load_file

    tensors = load_file(theirs.folder / "model.safetensors")
    return {name: torch.tensor(x, requires_grad=requires_grad) for name, x in tensors.items()}


def _head(weights: dict[str, Any], settings: dict[str, Any], kind: str, x: Any) -> Any:
    import torch

    if kind.endswith("TokenClassification"):
        return x @ weights["score.weight"].T + weights["score.bias"]
    if kind.endswith("SequenceClassification"):
        return x[-1:] @ weights["score.weight"].T
    logits = x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
    logits = logits / (settings["mup_width_multiplier"] or 1.0)
    dummies = [*range(100256, 100352)]
    for token in (100257, 100261, 100262, 100263, 100266):
        dummies.remove(token)
    dummies = [token for token in dummies if token < logits.shape[-1]]
    is_dummy = torch.zeros(logits.shape[-1], dtype=torch.bool)
    is_dummy[dummies] = True
    return torch.where(is_dummy, torch.finfo(torch.float32).min, logits)


def _decoder(weights: dict[str, Any], settings: dict[str, Any], ids: Any) -> Any:
    import torch

    x = weights["model.embed_tokens.weight"][ids]
    if settings["mup_embedding_multiplier"] is not None and settings["mup_embedding_multiplier"] > 0:
        x = x * settings["mup_embedding_multiplier"]
    cos, sin = _rope(settings, len(ids))
    sparse = torch.tensor(visible_mask(settings, len(ids)))
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().expand_as(sparse)
    for layer in range(settings["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        every = settings["dense_attention_every_n_layers"]
        is_dense = every is not None and (layer + 1) % every == 0
        normed = _norm(own, "input_layernorm", settings, x)
        x = x + _attention(own, settings, normed, cos, sin, causal if is_dense else sparse)
        x = x + _mlp(own, settings, _norm(own, "post_attention_layernorm", settings, x))
    return _norm(weights, "model.final_layernorm", settings, x)


def _norm(weights: dict[str, Any], name: str, settings: dict[str, Any], x: Any) -> Any:
    import torch

    own = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return torch.nn.functional.layer_norm(x, x.shape[-1:], *own, settings["layer_norm_epsilon"])


def _rope(settings: dict[str, Any], length: int) -> tuple[Any, Any]:
    """Returns cosines and sines [T, H]."""
    import torch

    width = settings["hidden_size"] // settings["num_attention_heads"]
    powers = settings["rope_embedding_base"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    positions, factor = torch.arange(length, dtype=torch.float32), 1.0
    if (entry := settings["rope_scaling"]) is None:
        positions, frequencies = positions * settings["rope_position_scale"], 1.0 / powers
    else:
        original = settings["original_max_position_embeddings"]
        name = "long" if length > original else "short"
        frequencies = 1.0 / (torch.tensor(entry[f"{name}_factor"]) * powers)
        growth = settings["max_position_embeddings"] / original
        default = math.sqrt(1 + math.log(growth) / math.log(original)) if name == "long" else 1.0
        given = entry.get(f"{name}_mscale")
        factor = given if given is not None and given > 0 else default
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos() * factor, angles.sin() * factor


def _attention(
    own: dict[str, Any], settings: dict[str, Any], x: Any, cos: Any, sin: Any, visible: Any
) -> Any:
    import torch

    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    groups, length, width = heads // kv_heads, len(x), settings["hidden_size"] // heads
    qkv = x @ own["self_attn.query_key_value.weight"].T + own["self_attn.query_key_value.bias"]
    qkv = qkv.view(length, kv_heads, groups + 2, width)
    query = qkv[:, :, :groups].reshape(length, heads, width).transpose(0, 1)
    key, value = (qkv[:, :, groups + i].transpose(0, 1).repeat_interleave(groups, 0) for i in (0, 1))

    def rotate(y: Any) -> Any:
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    scale = settings["mup_attn_multiplier"] / width if settings["mup_use_scaling"] else width**-0.5
    scores = rotate(query) @ rotate(key).transpose(1, 2) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = (weights @ value).transpose(0, 1).reshape(length, -1)
    return out @ own["self_attn.dense.weight"].T + own["self_attn.dense.bias"]


def _mlp(own: dict[str, Any], settings: dict[str, Any], x: Any) -> Any:
    import torch

    up = x @ own["mlp.up_proj.weight"].T + own["mlp.up_proj.bias"]
    a, b = up[:, ::2], up[:, 1::2]
    if (limit := settings["gegelu_limit"]) is not None:
        a = torch.where(torch.isinf(a), a, a.clamp(max=limit))
        b = torch.where(torch.isinf(b), b, b.clamp(-limit, limit))
    out = a * torch.sigmoid(1.702 * a) * (b + 1)
    return out @ own["mlp.down_proj.weight"].T + own["mlp.down_proj.bias"]
