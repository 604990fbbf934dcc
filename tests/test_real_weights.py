"""SmolLM2-135M-Instruct, the default model: its answer, and its perplexity beside transformers'."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from reference import distance

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint import default_model
from phi3_jax.generation import stream_tokens
from phi3_jax.generation.pipeline import Pipeline

pytestmark = pytest.mark.slow

ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]
"""What llama.cpp and transformers answer to QUESTION with the same weights."""
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model cannot be had: {error}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answer(folder: Path, dtype: str) -> None:
    pipeline = Pipeline.load(folder, dtype=dtype)
    tokenizer = pipeline.tokenizer
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens = stream_tokens(pipeline.compiled, prompt, max_new_tokens=50, end_tokens=pipeline.end_tokens)
    answer = list(tokens)
    assert answer == ANSWER
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_loss_and_logits_equal_transformers(folder: Path, shared_data: Callable[..., Path]) -> None:
    """On 1,024 tokens of a novel; weights, loss and every logit in float32."""
    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")
    ids = np.array([Phi3Tokenizer.from_pretrained(folder).encode(text[:8000])[:1024]])
    ours = Phi3ForCausalLM.from_pretrained(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = jax.jit(lambda model, ids: model(ids, labels=ids))(ours, ids)
    with torch.no_grad():
        ref = theirs(torch.tensor(ids), labels=torch.tensor(ids))
    assert distance(out.loss, ref.loss) <= 1e-5
    assert distance(out.logits, ref.logits) <= 1e-5
    perplexity = float(np.exp(out.loss))
    assert 30 < perplexity < 32  # 30.8; rows of q and k left in GGUF's order give several times that


def test_bfloat16_stays_close(folder: Path, shared_data: Callable[..., Path]) -> None:
    """Half precision costs at most 1 % of perplexity."""
    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")
    ids = np.array([Phi3Tokenizer.from_pretrained(folder).encode(text[:8000])[:1024]])
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = Phi3ForCausalLM.from_pretrained(folder, dtype=dtype)
        losses[dtype] = float(jax.jit(lambda model: model(ids, labels=ids).loss)(model))
    assert abs(losses["bfloat16"] - losses["float32"]) < 0.01
