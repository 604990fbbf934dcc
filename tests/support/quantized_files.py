"""Quantized checkpoints in the layouts of other libraries, written integer by integer."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from reference import small_config, write_random_model
from safetensors.numpy import load_file, save_file

from phi3_jax import Phi3Config
from phi3_jax.checkpoint.safetensors import SafetensorsSource

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
BFLOAT16, FLOAT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass
class Weight:
    """A weight [out, in] as (q - z) s, where q and z have no sign, or float8 q and no z."""

    q: np.ndarray
    z: np.ndarray
    """[out, groups]."""
    s: np.ndarray
    """[out, groups]."""
    g_idx: np.ndarray
    """The group of each input."""
    bits: int

    def floats(self) -> np.ndarray:
        scale, zero = (each.astype(np.float32)[:, self.g_idx] for each in (self.s, self.z))
        return (self.q.astype(np.float32) - zero) * scale


def random_weight(rng: np.random.Generator, shape: tuple[int, int], form: "Form") -> Weight:
    outputs, inputs = shape
    groups = inputs // (form.group_size or inputs)
    half = 2 ** (form.bits - 1)
    z = np.full((outputs, groups), half)
    if not form.symmetric:
        z = rng.integers(0, 2 * half, z.shape)
        z[0, 0], z[1, 0] = 0, 2 * half - 1
    s = (rng.uniform(0.5, 1.5, z.shape) * 0.2 / half).astype(form.scales)
    q = rng.integers(0, 2 * half, shape)
    if form.is_float:
        q, z = rng.normal(0, 40, shape).astype(FLOAT8), np.zeros_like(z)
    if form.one_scale:
        s[:] = s[0, 0]
    g_idx = np.arange(inputs) // (inputs // groups)
    if form.shuffled:
        rng.shuffle(g_idx)
    return Weight(q, z, s, g_idx, form.bits)


def words(integers: Any, bits: int) -> np.ndarray:
    """Packs the last axis of a matrix; the first integer of a word has its lowest bits."""
    count = 32 // bits
    rows = [
        [
            sum(int(integer) << (bits * at) for at, integer in enumerate(row[start : start + count]))
            for start in range(0, len(row), count)
        ]
        for row in np.asarray(integers)
    ]
    return np.array(rows, np.uint32).view(np.int32)


def awq(weight: Weight) -> dict[str, np.ndarray]:
    def pack(matrix: np.ndarray) -> np.ndarray:  # [rows, out]
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return words(matrix.reshape(len(matrix), -1, 8)[:, :, order].reshape(matrix.shape), 4)

    return {"qweight": pack(weight.q.T), "qzeros": pack(weight.z.T), "scales": weight.s.T.copy()}


def gptq(weight: Weight, version: int = 1) -> dict[str, np.ndarray]:
    zeros = words(weight.z.T, weight.bits).view(np.uint32)
    if version == 1:
        zeros = zeros - np.uint32(0x11111111 if weight.bits == 4 else 0x01010101)  # wraps, as GPTQModel's
    return {
        "qweight": words(weight.q, weight.bits).T.copy(),
        "qzeros": zeros.view(np.int32),
        "scales": weight.s.T.copy(),
        "g_idx": weight.g_idx.astype(np.int32),
    }


def packed(weight: Weight, symmetric: bool = True, g_idx: bool = False) -> dict[str, np.ndarray]:
    tensors = {
        "weight_packed": words(weight.q, weight.bits),
        "weight_scale": weight.s,
        "weight_shape": np.array(weight.q.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(weight.z.T, weight.bits).T.copy()
    if g_idx:
        tensors["weight_g_idx"] = weight.g_idx.astype(np.int32)
    return tensors


def plain(weight: Weight, zeros: bool = False) -> dict[str, np.ndarray]:
    half = 2 ** (weight.bits - 1)
    q = weight.q if weight.q.dtype == FLOAT8 else (weight.q - half).astype(np.int8)
    tensors = {"weight": q, "weight_scale": weight.s}
    return tensors | ({"weight_zero_point": (weight.z - half).astype(np.int8)} if zeros else {})


def compressed(form: str, *, activations: bool = False, **weights: Any) -> dict[str, Any]:
    """Returns the `quantization_config` of compressed-tensors."""
    defaults = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "dynamic": True, "strategy": "token"} if activations else None
    group = {"targets": ["Linear"], "weights": defaults | weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass
class Form:
    """A form of quantized checkpoints: how its weights are made, stored and announced."""

    tensors: Callable[[Weight], dict[str, np.ndarray]]
    settings: dict[str, Any]
    bits: int = 4
    group_size: int | None = 16
    symmetric: bool = True
    shuffled: bool = False
    is_float: bool = False
    one_scale: bool = False
    int8_activations: bool = False
    scales: Any = np.float16
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """More tensors of each module."""


GROUPS = {"strategy": "group", "group_size": 16}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
ROUND = GPTQ | {"quant_method": "intel/auto-round", "sym": True, "backend": "auto_round:exllamav2"}
ZERO = np.zeros(1, np.float32)

FORMS: dict[str, Form] = {
    "awq": Form(awq, AWQ | {"modules_to_not_convert": ["lm_head"]}, symmetric=False),
    "awq with a scale for each output": Form(
        awq, AWQ | {"group_size": -1}, group_size=None, symmetric=False, scales=BFLOAT16
    ),
    "gptq": Form(gptq, GPTQ | {"checkpoint_format": "gptq"}, symmetric=False),
    "gptq, version 2": Form(
        lambda weight: gptq(weight, 2), GPTQ | {"checkpoint_format": "gptq_v2"}, symmetric=False
    ),
    "gptq, symmetric, with biases of zero": Form(gptq, GPTQ | {"sym": True}, extras={"bias": ZERO}),
    "gptq, sorted by importance": Form(gptq, GPTQ | {"desc_act": True}, symmetric=False, shuffled=True),
    "gptq of 8 bits": Form(gptq, GPTQ | {"bits": 8, "sym": True, "desc_act": True}, bits=8, shuffled=True),
    "gptq of 8 bits with zero points": Form(
        gptq, GPTQ | {"bits": 8, "group_size": -1}, bits=8, group_size=None, symmetric=False
    ),
    "gptq without g_idx": Form(
        lambda weight: {name: each for name, each in gptq(weight).items() if name != "g_idx"},
        GPTQ,
        symmetric=False,
    ),
    "auto-round": Form(
        gptq,
        GPTQ
        | {"quant_method": "auto-round", "sym": True, "packing_format": "auto_round:auto_gptq"}
        | {"extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}},
    ),
    "auto-round of an older version": Form(gptq, ROUND),
    "auto-round of an older version with other zero points": Form(lambda weight: gptq(weight, 2), ROUND),
    "auto-round of an older version in 8 bits": Form(
        lambda weight: gptq(weight, 2), ROUND | {"bits": 8}, bits=8
    ),
    "auto-round as awq": Form(
        awq, AWQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, symmetric=False
    ),
    "pack-quantized": Form(packed, compressed("pack-quantized", **GROUPS), scales=BFLOAT16),
    "pack-quantized of 8 bits": Form(
        packed, compressed("pack-quantized", num_bits=8), bits=8, group_size=None, scales=BFLOAT16
    ),
    "pack-quantized of 8 bits with activations": Form(
        packed,
        compressed("pack-quantized", num_bits=8, activations=True),
        bits=8,
        group_size=None,
        int8_activations=True,
    ),
    "pack-quantized with zero points": Form(
        lambda weight: packed(weight, symmetric=False),
        compressed("pack-quantized", symmetric=False, **GROUPS),
        symmetric=False,
    ),
    "pack-quantized with zero points of int8": Form(
        lambda weight: packed(weight) | {"weight_zero_point": plain(weight, True)["weight_zero_point"]},
        compressed("pack-quantized", symmetric=False, **GROUPS),
        symmetric=False,
    ),
    "pack-quantized, sorted by importance": Form(
        lambda weight: packed(weight, g_idx=True),
        compressed("pack-quantized", actorder="group", **GROUPS),
        shuffled=True,
    ),
    "pack-quantized with an order that is not set": Form(
        lambda weight: packed(weight) | {"weight_g_idx": np.full(weight.q.shape[1], -1, np.int32)},
        compressed("pack-quantized", **GROUPS),
    ),
    "int-quantized": Form(
        lambda weight: plain(weight, zeros=True),  # which older versions write
        compressed("int-quantized", num_bits=8, activations=True),
        bits=8,
        group_size=None,
        int8_activations=True,
        scales=BFLOAT16,
    ),
    "int-quantized with zero points": Form(
        lambda weight: plain(weight, zeros=True),
        compressed("int-quantized", num_bits=8, symmetric=False, **GROUPS),
        bits=8,
        symmetric=False,
    ),
    "naive-quantized of 4 bits": Form(plain, compressed("naive-quantized", **GROUPS)),
    "float-quantized": Form(
        plain,
        compressed("float-quantized", num_bits=8, type="float", activations=True),
        bits=8,
        group_size=None,
        is_float=True,
        scales=BFLOAT16,
    ),
    "fp8": Form(
        lambda weight: plain(weight) | {"weight_scale": weight.s[0, 0]},
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        bits=8,
        group_size=None,
        is_float=True,
        one_scale=True,
        scales=np.float32,
        extras={"input_scale": np.array(0.5, np.float32), "output_scale": np.array(0.5, np.float32)},
    ),
}


def write_quantized(
    folder: Path, form: Form, config: Phi3Config | None = None, **changes: Any
) -> dict[str, np.ndarray]:
    """Writes a random model of two layers, or of this config, and returns its tensors as floats."""
    config = config or small_config(**changes)
    write_random_model("causal", config, folder)
    projections = tuple(f"{path}.weight" for path in config.projections.values())
    floats = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(7)
    stored: dict[str, np.ndarray] = {}
    for name, tensor in list(floats.items()):
        module = name.removesuffix(".weight")
        if not name.endswith(projections):
            stored[name] = floats[name] = tensor.astype(BFLOAT16)
            continue
        weight = random_weight(rng, tensor.shape, form)
        floats[name] = weight.floats()
        stored |= {f"{module}.{kind}": each for kind, each in (form.tensors(weight) | form.extras).items()}
    save_file(
        {name: np.array(each, order="C") for name, each in stored.items()}, folder / "model.safetensors"
    )
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": form.settings}))
    return floats


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of one file, also of dtypes that NumPy lacks."""
    source = SafetensorsSource(folder, quantized=True)
    return {name: source.read(name) for name in source.names()}
