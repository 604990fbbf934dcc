"""Quantized weights of GGUF files stay quantized: their numbers are those of the gguf package."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dequantized import floats_of
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf_files import VOCAB, stored_layout, weights, write_gguf
from reference import run

from phi3_jax import Phi3ForCausalLM, make_mesh
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.gguf_blocks import concatenate, form_of_blocks, read_blocks
from phi3_jax.errors import CheckpointError, UserError
from phi3_jax.model import loading
from phi3_jax.model.layers import QuantizedParam
from phi3_jax.model.quantizing import quantizable
from phi3_jax.quantization import WeightForm

ROWS, COLUMNS = 6, 512
QKV = "model.layers.0.self_attn.qkv_proj.weight"
SEVERAL = {
    "token_embd.weight": Kind.Q8_0,
    "blk.0.attn_q.weight": Kind.Q4_0,
    "blk.1.attn_q.weight": Kind.Q5_1,
    "blk.1.attn_v.weight": Kind.Q8_0,
    "blk.0.ffn_down.weight": Kind.F16,
}


def blocks_of(kind: Kind) -> np.ndarray:
    """Returns rows of blocks, of which some have one number only: zero or another."""
    draws = np.random.default_rng(5)
    if kind != Kind.Q4_K:
        floats = draws.normal(0, 0.3, (ROWS, COLUMNS)).astype(np.float32)
        floats[0, :32], floats[1, 32:64], floats[2, -32:] = 0, 1.5, -0.125
        return quants.quantize(floats, kind)
    rows = draws.integers(0, 256, (ROWS, COLUMNS // 256, 144), np.uint8)
    factors = draws.uniform(0.001, 0.01, (ROWS, COLUMNS // 256, 2)).astype(np.float16)
    factors[0, 0, 0], factors[1, 1] = 0, 0
    rows[:, :, :4] = factors.view(np.uint8)
    return rows.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K], ids=lambda kind: kind.name)
def test_keeps_numbers(kind: Kind) -> None:
    rows = blocks_of(kind)
    expected = quants.dequantize(rows, kind)
    stored = read_blocks(kind.name, rows)
    assert stored.form == form_of_blocks({kind.name}, COLUMNS)
    assert stored.values.dtype == np.int8
    assert stored.bits == 8 or -8 <= stored.values.min() < stored.values.max() <= 7
    assert stored.scale.all()
    np.testing.assert_allclose(stored.dequantize(), expected, rtol=1e-6, atol=2e-7 * np.abs(expected).max())


def test_concatenates_rows_with_and_without_zeros() -> None:
    parts = [read_blocks(kind.name, blocks_of(kind)) for kind in (Kind.Q4_0, Kind.Q4_1)]
    whole = concatenate(parts)
    assert whole.form == form_of_blocks({"Q4_0", "Q4_1"}, COLUMNS) == WeightForm(4, 16, has_zero=True)
    np.testing.assert_array_equal(whole.dequantize(), np.concatenate([part.dequantize() for part in parts]))


def write_file(path: Path, **options: Any) -> GGUFSource:
    tensors = stored_layout(weights(fused=False))
    return GGUFSource(write_gguf(path / "a.gguf", "llama", tensors, Kind.Q4_1, **options))


def test_forms_follow_the_kinds_of_all_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Parts of 4 and 8 bits together, and kinds of 5 bits, are rounded to 8 bits; floats stay floats."""
    source = write_file(tmp_path, kinds=SEVERAL)
    forms = {name: source.form(name) for name in source.names()}
    assert forms["model.embed_tokens.weight"] == WeightForm(8, 4)
    assert forms["model.norm.weight"] is None
    assert forms["model.layers.0.mlp.down_proj.weight"] is None
    assert forms[QKV] == forms["lm_head.weight"] == WeightForm(4, 4, has_zero=True)
    rounded = QKV.replace("0", "1")
    assert forms[rounded] == WeightForm(8, 4)
    for name, form in forms.items():
        if form is None:
            continue
        with caplog.at_level(logging.INFO, "phi3_jax"):
            stored = source.read_quantized(name)
        assert stored.form == form
        expected = source.read(name)
        error = np.abs(stored.dequantize() - expected).reshape(-1, 32)
        largest = np.abs(expected).reshape(-1, 32).max(1, keepdims=True)
        assert (error <= (0.51 / 127 + 2**-8 if name == rounded else 1e-6) * largest).all(), name
    (message,) = caplog.messages
    assert message.endswith("stored as Q4_1 and Q5_1 and Q8_0 are rounded to int8 with groups of 32 inputs")


def test_loads_small_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal the floats that the file stands for, on one device and on a mesh."""
    monkeypatch.setattr(loading, "available", lambda: True)  # also without a compiler
    path = write_file(tmp_path, kinds=SEVERAL).path
    model = Phi3ForCausalLM.from_pretrained(path, dtype="float32")
    kinds = {
        name: str(module.weight.get_value().values.dtype)
        for name, module in quantizable(model)
        if isinstance(module.weight, QuantizedParam)
    }
    assert kinds["model.layers.0.self_attn.qkv_proj"] == "uint8"
    assert kinds["model.embed_tokens"] == "int8"
    assert len(kinds) == 4 * 2 + 2 - 1
    ids = np.arange(24).reshape(2, 12) * 3 % VOCAB
    expected = run(floats_of(model), input_ids=ids).logits
    np.testing.assert_allclose(run(model, input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    mesh = make_mesh("tensor=2", jax.devices()[:2])
    divided = Phi3ForCausalLM.from_pretrained(path, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(run(divided, input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    floats = Phi3ForCausalLM.from_pretrained(path, dtype="float32", quantization="none")
    assert not any(isinstance(module.weight, QuantizedParam) for _, module in quantizable(floats))
    exact = write_file(tmp_path, kinds={"token_embd.weight": Kind.Q8_0}).path
    ours = Phi3ForCausalLM.from_pretrained(exact, dtype="float32")
    floats = Phi3ForCausalLM.from_pretrained(exact, dtype="float32", quantization="none")
    expected = run(floats, input_ids=ids).logits
    np.testing.assert_allclose(run(ours, input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_minima_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints have integers for zero points."""
    monkeypatch.setattr(loading, "available", lambda: True)
    path = write_file(tmp_path).path
    model = Phi3ForCausalLM.from_pretrained(path, dtype="float32")
    with pytest.raises(UserError, match=r'are not integers of 4 bits.*quantization="none" or "int8"'):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    for quantization in ("none", "int8:skip=none"):
        ours = Phi3ForCausalLM.from_pretrained(path, dtype="float32", quantization=quantization)
        ours.save_pretrained(tmp_path / "out")
        ids = np.arange(24).reshape(2, 12) * 3 % VOCAB
        saved = Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
        np.testing.assert_array_equal(run(saved, input_ids=ids).logits, run(ours, input_ids=ids).logits)


@pytest.mark.parametrize("place", [0, 2])
def test_rejects_scales_that_are_not_finite(tmp_path: Path, place: int) -> None:
    source = write_file(tmp_path)
    content = bytearray(source.path.read_bytes())
    start = content.index(source._file.blocks("blk.0.attn_k.weight")[:1].tobytes())
    content[start + place : start + place + 2] = np.float16(np.nan).tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken.gguf: tensor 'blk.0.attn_k.weight' has scales"):
        Phi3ForCausalLM.from_pretrained(broken)
