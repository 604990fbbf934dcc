"""The option --quantize: commands answer as a model whose floats are the rounded ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dequantized import floats_of
from small_checkpoint import PROMPT

from phi3_jax import Phi3ForCausalLM
from phi3_jax.model import quantize_model

INT4 = "int4:group_size=8,skip=none"


@pytest.fixture(scope="module")
def rounded_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with rounded floats."""
    folder = tmp_path_factory.mktemp("rounded") / "model"
    shutil.copytree(model_folder, folder)
    floats_of(quantize_model(Phi3ForCausalLM.from_pretrained(model_folder), INT4)).save_pretrained(folder)
    return folder


def test_generate_and_chat_answer_with_rounded_weights(
    run: Any, model_folder: Path, rounded_folder: Path
) -> None:
    for command in (("generate", PROMPT), ("chat",)):
        words = (*command, "--max-new-tokens", 7, "--dtype", "float32", "--model")
        given = ((model_folder,), (rounded_folder,), (model_folder, "--quantize", INT4))
        base, expected, quantized = (run(*words, *each, stdin=f"{PROMPT}\n") for each in given)
        assert quantized.code == 0
        assert quantized.out == expected.out != base.out


@pytest.mark.slow
def test_batch_and_evaluate_answer_with_rounded_weights(
    run: Any, model_folder: Path, rounded_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": PROMPT}) + "\n")
    (tmp_path / "text.txt").write_text("What is the capital of France? " * 3)
    batches, reports = [], []
    for name, options in {"floats": (rounded_folder,), "ints": (model_folder, "--quantize", INT4)}.items():
        tail = ("--dtype", "float32", "--model", *options)
        out = tmp_path / f"{name}.jsonl"
        sizes = ("--max-new-tokens", 4, "--max-length", 128, "--slots", 1)
        assert run("batch", "--input", tmp_path / "in.jsonl", "--output", out, *sizes, *tail).code == 0
        batches.append(out.read_text())
        reports.append(json.loads(run("evaluate", tmp_path / "text.txt", *tail, "--length", 32).out))
    assert batches[0] == batches[1]
    assert reports[1]["perplexity"] == pytest.approx(reports[0]["perplexity"], rel=1e-5)
    assert [report.get("quantize") for report in reports] == [None, INT4]


def test_batch_is_not_resumed_with_another_quantization(run: Any, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n')  # an error as answer needs no model
    words = ("batch", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert run(*words, "--model", model_folder).code == 3
    result = run(*words, "--model", model_folder, "--quantize", "int8")
    assert result.code == 1
    assert "started with other options and cannot be resumed: quantize" in result.err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int2", "quantization 'int2' is not known; use int8 or int4"),
        ("int4:group_size=1024", "groups of 1024 do not divide"),
        ("int4:activations=int8", "activations=int8 of a quantization needs bits=8"),
    ],
)
def test_rejects_a_quantization(run: Any, model_folder: Path, value: str, message: str) -> None:
    result = run("generate", PROMPT, "--model", model_folder, "--quantize", value)
    assert result.code == 1
    assert message in result.err
