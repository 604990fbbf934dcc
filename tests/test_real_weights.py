"""SmolLM2-135M-Instruct, the default model: answers and perplexities, compared with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import distance

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint import convert_checkpoint
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.generation import stream_tokens
from phi3_jax.pipeline import Pipeline

pytestmark = [pytest.mark.slow, pytest.mark.optimized, pytest.mark.usefixtures("torch_threads")]

ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]
"""The answer of llama.cpp and transformers to QUESTION with the same weights."""
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is not available: {error}")


@pytest.fixture(scope="module")
def floats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as floats, for transformers; ours keep their 4 bits."""
    converted = tmp_path_factory.mktemp("floats") / "model"
    convert_checkpoint(folder, converted)
    return converted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_as_llama_cpp_and_transformers(folder: Path, dtype: str) -> None:
    pipeline = Pipeline.load(folder, dtype=dtype)
    tokenizer = pipeline.tokenizer
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = list(stream_tokens(pipeline.compiled, prompt, max_new_tokens=50))
    assert answer == ANSWER
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_loss_and_logits_match_transformers(
    folder: Path, floats: Path, shared_data: Callable[..., Path]
) -> None:
    """1,024 tokens of a novel, in float32."""
    import torch
    import transformers

    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")
    ids = np.array([Phi3Tokenizer.from_pretrained(folder).encode(text[:8000])[:1024]])
    ours = Phi3ForCausalLM.from_pretrained(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).eval()
    out = jax.jit(lambda model, ids: model(ids, labels=ids))(ours, ids)
    with torch.no_grad():
        ref = theirs(torch.tensor(ids), labels=torch.tensor(ids))
    assert distance(out.loss, ref.loss) <= 1e-5
    assert distance(out.logits, ref.logits) <= 1e-5
    perplexity = float(np.exp(out.loss))
    assert 30 < perplexity < 32  # 30.8; rows of q and k left in GGUF's order give several times that


def test_bfloat16_stays_close_to_float32(folder: Path, shared_data: Callable[..., Path]) -> None:
    """Half precision changes the perplexity by at most 1 %."""
    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")
    ids = np.array([Phi3Tokenizer.from_pretrained(folder).encode(text[:8000])[:1024]])
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = Phi3ForCausalLM.from_pretrained(folder, dtype=dtype)
        losses[dtype] = float(jax.jit(lambda model: model(ids, labels=ids).loss)(model))
    assert abs(losses["bfloat16"] - losses["float32"]) < 0.01


PROMPTS = [
    "Write a story about a lighthouse.",
    "List the planets of the solar system and say one thing about each of them.",
    "Why?",
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 64},
    "beams": {"max_new_tokens": 40, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.8},
    "guidance": {"max_new_tokens": 40, "guidance_scale": 1.5},
    "processors": {
        "max_new_tokens": 60,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 50,
        "bad_words_ids": [[198], [28, 281]],
        "suppress_tokens": [30],
    },
}


@pytest.fixture(scope="module")
def batch(folder: Path, floats: Path) -> Any:
    """Both models, and chat prompts of different lengths with their mask."""
    import torch
    import transformers

    tokenizer = Phi3Tokenizer.from_pretrained(folder, padding_side="left")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]
    encoded = tokenizer(texts, add_special_tokens=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).eval()
    ours = Phi3ForCausalLM.from_pretrained(folder, dtype="float32")
    return ours, theirs, np.asarray(encoded.input_ids), np.asarray(encoded.attention_mask)


@pytest.mark.parametrize("mode", MODES)
def test_generate_matches_transformers(batch: Any, mode: str) -> None:
    """Prompts of different lengths are continued to their end tokens."""
    import torch

    ours, theirs, ids, mask = batch
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True} | MODES[mode]
    out = ours.generate(ids, mask, **options)
    ref = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    np.testing.assert_array_equal(out.sequences, ref.sequences.numpy())
    if mode == "beams":
        np.testing.assert_allclose(out.sequences_scores, ref.sequences_scores.numpy(), atol=1e-4)


def test_prompt_lookup_changes_no_token(batch: Any) -> None:
    ours, _, ids, mask = batch
    plain = ours.generate(ids, mask, do_sample=False, max_new_tokens=40)
    looked_up = ours.generate(ids, mask, do_sample=False, max_new_tokens=40, prompt_lookup_num_tokens=8)
    np.testing.assert_array_equal(looked_up, plain)


def test_int8_cache_changes_perplexity_little(folder: Path, shared_data: Callable[..., Path]) -> None:
    """1,024 tokens of a novel: the perplexities are within 0.5 %, at half the memory."""
    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")
    ids = np.array([Phi3Tokenizer.from_pretrained(folder).encode(text[:8000])[:1024]])
    model = Phi3ForCausalLM.from_pretrained(folder, dtype="bfloat16")

    @jax.jit
    def losses(model: Any, chunk: Any, following: Any, cache: Any) -> Any:
        out = model(chunk, past_key_values=cache)
        log_p = jax.nn.log_softmax(out.logits, axis=-1)
        picked = jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
        return -picked[0], out.past_key_values

    perplexities, sizes = {}, {}
    for dtype in ("bfloat16", "int8"):
        cache = model.init_cache(1, ids.shape[1], dtype=dtype)
        sizes[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
        total = []
        for start in range(0, ids.shape[1], 512):
            following = np.roll(ids, -1, axis=1)[:, start : start + 512]
            loss, cache = losses(model, ids[:, start : start + 512], following, cache)
            total.append(np.asarray(loss))
        perplexities[dtype] = float(np.exp(np.concatenate(total)[:-1].mean()))
    print(perplexities, sizes)
    assert abs(perplexities["int8"] / perplexities["bfloat16"] - 1) < 0.005
    assert sizes["int8"] < 0.52 * sizes["bfloat16"]
