"""Tests that commands take a checkpoint of Phi-3-small, arranged as the published one."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phi3small import small_config
from rank_files import rank_file, sized_tokens

from phi3_jax import Phi3SmallForCausalLM, Phi3SmallForSequenceClassification, Phi3Tokenizer

TEXT = "The old bridge over the river is closed on Monday, and nobody knows why. " * 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    special = {"bos_token_id": 100257, "eos_token_id": 100257, "pad_token_id": None}
    sizes = {"vocab_size": 100352, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512}
    Phi3SmallForCausalLM(small_config(**special, **sizes), rngs=1).save_pretrained(folder)
    (folder / "cl100k_base.tiktoken").write_bytes(rank_file(sized_tokens()))
    ends = {"bos_token_id": 100257, "eos_token_id": [100257, 100266]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def test_generate(run: Any, checkpoint: Path) -> None:
    """The answer is that of the model, after the prompt in the template."""
    options = ["--model", checkpoint, "--max-new-tokens", 6, "--temperature", 0, "--dtype", "float32"]
    result = run("generate", "Who are you?", *options)
    assert result.code == 0, result.err
    tokenizer = Phi3Tokenizer.from_pretrained(checkpoint)
    prompt = "<|endoftext|><|user|>\nWho are you?<|end|>\n<|assistant|>\n"
    ids = np.array([tokenizer.encode(prompt)])
    model = Phi3SmallForCausalLM.from_pretrained(checkpoint)
    answer = np.asarray(model.generate(ids, max_new_tokens=6, do_sample=False))[0, ids.shape[1] :]
    assert result.out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


@pytest.mark.slow
def test_from_the_checkpoint_to_labels_and_answers(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Commands that write models write ones that the others read."""

    def check(*arguments: object) -> str:
        result = run(*arguments)
        assert result.code == 0, result.err
        return result.out + result.err

    text, model = tmp_path / "text.txt", ["--model", checkpoint]
    text.write_text(TEXT)
    check("convert", checkpoint, tmp_path / "converted", "--dtype", "bfloat16")
    check("quantize", tmp_path / "converted", tmp_path / "int4", "--weights", "int4:group_size=16")
    assert "perplexity" in check("evaluate", text, "--model", tmp_path / "int4", "--length", 64)

    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"id": f"{n}", "prompt": TEXT[:n]}) + "\n" for n in (20, 300, 70)))
    check("batch", *model, "--input", requests, "--output", tmp_path / "answers.jsonl", "--max-new-tokens", 5)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3

    rows = tmp_path / "rows.csv"
    rows.write_text(
        "text,label\n" + "".join(f"{TEXT[n : n + 30].replace(',', '')},{'ab'[n % 2]}\n" for n in range(24))
    )
    options = ["--task", "sequence-classification", *model, "--train-file", rows, "--max-steps", 2]
    options += ["--train-batch-size", 4, "--max-length", 32]
    adapters = ["--trained", "lora", "--lora-rank", 2, "--lora-targets", '["qkv_proj", "up_proj"]']
    check("finetune", *options, *adapters, "--output-dir", tmp_path / "run")
    labelled = tmp_path / "labelled.csv"
    check("classify", "--model", tmp_path / "run", "--input", rows, "--output", labelled)
    with labelled.open() as file:
        assert {row["predicted_label"] for row in csv.DictReader(file)} <= {"a", "b"}
    given = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert given["target_modules"] == ["query_key_value", "up_proj"]
    assert given["task_type"] == "SEQ_CLS"
    loaded = Phi3SmallForSequenceClassification.from_pretrained(tmp_path / "run")
    assert loaded.config.extra["architectures"] == ["Phi3SmallForSequenceClassification"]


@pytest.mark.slow
def test_finetune_names_the_row_of_a_dummy_token(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The bridge"}\n{"text": "The <|dummy_id_3|> bridge"}\n')
    options = ["--task", "causal-lm", "--model", checkpoint, "--train-file", rows, "--max-length", 32]
    result = run("finetune", *options, "--output-dir", tmp_path / "run")
    assert result.code == 1
    assert (
        "rows.jsonl, line 2: the id 100267 is to be predicted, and the model has no such token" in result.err
    )


@pytest.mark.parametrize("peer", ["transformers", "llama.cpp"])
def test_bench_has_no_peer(run: Any, checkpoint: Path, peer: str) -> None:
    result = run("bench", "--model", checkpoint, "--peer", peer, "--new-tokens", 2)
    assert result.code == 1
    assert f"{peer} has no model of model_type 'phi3small'" in result.err
