"""Tests the command `phi3-jax quantize`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.quantization import Quantization, round_weight

NAME = "model.layers.0.mlp.down_proj.weight"


def test_rounds_and_tells_sizes(run: Any, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", model_folder, out, "--weights", "int4:group_size=16", "--max-shard-size", "40KB")
    assert (result.code, result.out) == (0, f"{out}: 0.00 GB, from 0.00 GB\n")
    assert len(list(out.glob("*.safetensors"))) > 1
    original = open_checkpoint(model_folder).source.read(NAME)
    expected = round_weight(original, Quantization(bits=4, group_size=16), NAME)
    found = open_checkpoint(out).source.read_quantized(NAME)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scale, expected.scale)
    assert (out / "tokenizer.json").read_bytes() == (model_folder / "tokenizer.json").read_bytes()


def test_rounds_to_8_bits_by_default(run: Any, model_folder: Path, tmp_path: Path) -> None:
    assert run("quantize", model_folder, tmp_path / "out").code == 0
    form = open_checkpoint(tmp_path / "out").source.form(NAME)
    assert form is not None
    assert (form.bits, form.groups, form.has_zero) == (8, 1, False)


def test_errors_are_one_line(run: Any, model_folder: Path, tmp_path: Path) -> None:
    assert run("quantize", model_folder, tmp_path / "int8").code == 0
    for arguments, says in (
        ((model_folder, tmp_path / "out", "--weights", "int3"), "quantization 'int3' is not known"),
        ((model_folder, tmp_path / "out", "--weights", "int4"), "groups of 64 do not divide"),
        ((model_folder, model_folder), "is the checkpoint itself"),
        ((tmp_path / "int8", tmp_path / "out"), "is quantized already"),
        ((tmp_path / "absent", tmp_path / "out"), "absent"),
    ):
        result = run("quantize", *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert says in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_calibrates_and_prints_what_it_costs(run: Any, model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is the capital of France? It is a city of two million people. " * 12)
    words = ("--weights", "int4:group_size=16", "--calibrate", text, "--windows", 4, "--window-length", 32)
    result = run("quantize", model_folder, tmp_path / "out", *words, "--dtype", "float32")
    assert result.code == 0
    assert [word in result.out for word in ("Perplexity of the next", "floats", "rounded", "calibrated")] == [
        True
    ] * 4
    assert result.out.endswith(f"{tmp_path / 'out'}: 0.00 GB, from 0.00 GB\n")
    assert open_checkpoint(tmp_path / "out").source.form(NAME) is not None
    text.write_text("What is the capital of France?")
    result = run("quantize", model_folder, tmp_path / "other", *words)
    assert result.code == 1
    assert "too few for a window of 32; give a longer text" in result.err
