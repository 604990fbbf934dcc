"""`phi3-jax bench`: bytes, prompts and tables, and small runs of both comparisons."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from gguf_files import VOCAB, byte_level, stored_layout, weights, write_gguf
from reference import small_config, write_random_model
from small_checkpoint import PROMPT, write_checkpoint

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.bench import batch as bench_batch
from phi3_jax.bench import generate as bench
from phi3_jax.bench import models, run, turns
from phi3_jax.bench.products import ProductSpeed, Speeds, _products
from phi3_jax.checkpoint import default_model, quantize_checkpoint
from phi3_jax.errors import UserError
from phi3_jax.model import quantize_model


def run_bench(model: Path, **changes: Any) -> None:
    options: dict[str, Any] = {
        "layers": None,
        "prompt": None,
        "prompt_lookup": None,
        "cache_dir": None,
        "requests": None,
    }
    options |= {"prompt_tokens": 8, "new_tokens": 3, "batch": 1, "rounds": 2, "dtype": "float32"}
    run.run_bench(str(model), **options | changes)


@pytest.mark.parametrize(
    ("dtype", "tied", "quantization"),
    [("float32", False, None), ("bfloat16", True, None), ("bfloat16", False, "int4:group_size=8")],
)
def test_bytes_per_step_are_those_of_the_weights_and_the_cache(
    tmp_path: Path, dtype: str, tied: bool, quantization: str | None
) -> None:
    config = small_config(head_dim=20, tie_word_embeddings=tied)
    Phi3ForCausalLM(config, dtype=dtype).save_pretrained(tmp_path)
    model = Phi3ForCausalLM.from_pretrained(tmp_path, quantization=quantization)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    if not tied:  # a step reads only a few rows
        weights -= model.model.embed_tokens.weight[...].nbytes
    cache = model.init_cache(2, 10 + 4 // 2, dtype)
    cached = sum(slots.nbytes for slots in (*cache.keys, *cache.values))
    options = bench.BenchOptions(
        tmp_path, dtype, 2, prompt_tokens=99, new_tokens=4, quantization=quantization
    )
    assert bench.bytes_per_step(options, prompt_tokens=10) == weights + cached


def test_prompts_are_random_or_of_a_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    options = bench.BenchOptions(tmp_path, "float32", batch=2, prompt_tokens=10, new_tokens=4)
    ids = options.ids(300)
    assert ids.shape == (2, 10)
    assert ids.min() >= 4
    assert ids.max() < 300
    np.testing.assert_array_equal(ids, options.ids(300))

    text = tmp_path / "question.txt"
    text.write_text(PROMPT)
    ids = replace(options, prompt=text).ids(300)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    assert [tokenizer.decode(row) for row in ids] == 2 * [f"<|user|>{PROMPT}<|end|><|assistant|>"]


@pytest.mark.parametrize(("theirs", "steps"), [(5, "5 steps"), (9, "5 and 9 steps")])
def test_table_shows_the_steps_of_both_sides(
    theirs: int, steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    ours = bench.Times(1.0, 2.0, 5, Speeds(27.3e9, 31e9))
    results = {"lookup of 3": [ours], "plain": [bench.Times(1.0, 2.0, theirs)]}
    options = bench.BenchOptions(tmp_path, "float32", batch=1, prompt_tokens=8, new_tokens=9)
    bench.print_table("small", results, options)
    table = " ".join(capsys.readouterr().out.split())
    assert f"prompt, {steps}, median of 1" in table
    assert "its products alone, GB/s │ 27.3 │ │ │" in table
    assert "memory that is only read, GB/s │ 31.0 │" in table
    assert table.endswith("products by XLA")


def test_table_says_what_the_weights_are_and_what_multiplies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "floats").mkdir()
    write_checkpoint(tmp_path / "floats")
    quantize_checkpoint(tmp_path / "floats", tmp_path / "small")
    library, xla = "products by the C++ library, avx2", "products by XLA"
    monkeypatch.setattr(models, "variant", lambda: "avx2")
    for folder, dtype, quantization, kinds, products in (
        ("floats", "bfloat16", None, "bfloat16", library),
        ("floats", "float32", None, "float32", xla),
        ("floats", "float32", "int8", "int8 and float32", library),
        ("small", "float32", None, "weights as stored and float32", library),
        ("small", "float32", "none", "float32", xla),
    ):
        given = tmp_path / folder, dtype, quantization
        assert models.describe_weights(*given) == kinds
        assert models.describe_products(*given) == products
        assert models.describe_products(*given, divided=True) == xla
    monkeypatch.setattr(models, "variant", lambda: None)
    assert models.describe_products(tmp_path / "floats", "bfloat16", None) == xla


@pytest.mark.parametrize("quantization", [None, "int4:group_size=8"])
def test_speed_of_products_counts_the_bytes_of_their_weights(quantization: str | None) -> None:
    model = Phi3ForCausalLM(small_config(head_dim=20, tie_word_embeddings=False))
    if quantization is not None:
        model = quantize_model(model, quantization)
    weights = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - model.model.embed_tokens.weight[...].nbytes
    )
    norms = sum(leaf.nbytes for leaf in jax.tree.leaves(model) if leaf.ndim == 1)
    speed = ProductSpeed(model, rows=2)
    assert speed._bytes == weights - norms
    assert min(speed.measure()) > 0
    assert np.isfinite(_products(model, speed._inputs)).all()


@pytest.mark.parametrize("lookup", [None, 2])
def test_measures_our_turns(tmp_path: Path, lookup: int | None) -> None:
    write_checkpoint(tmp_path)
    options = () if lookup is None else (("prompt_lookup_num_tokens", lookup),)
    turn = bench._ours(bench.BenchOptions(tmp_path, "float32", 1, 10, 5, generate_options=options))
    times = [turn(), turn()]
    assert all(run.prefill > 0 and run.decode > 0 and run.steps == 5 and run.speeds for run in times)


@pytest.mark.slow
def test_both_sides_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Phi3ForCausalLM(small_config()).save_pretrained(tmp_path)
    run_bench(tmp_path, batch=2, dtype="bfloat16")
    table = capsys.readouterr().out
    assert "phi3-jax" in table
    assert "transformers" in table
    for row in ("prefill, tokens/s", "decode, tokens/s"):
        assert re.search(rf"{row}\W+[\d,.]+\W+[\d,.]+\W+\d+\.\d\d\b", table), table


@pytest.mark.slow
def test_compares_prompt_lookup_with_plain_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "question.txt").write_text(PROMPT)
    run_bench(tmp_path, prompt=tmp_path / "question.txt", prompt_lookup=2)
    table = capsys.readouterr().out
    assert "14-token prompt" in table
    for row in ("lookup of 2", "plain", "ratio"):
        assert row in table
    assert re.search(r"decode, tokens/s\W+[\d,.]+\W+[\d,.]+\W+\d+\.\d\d\b", table), table


class FakeLlama:
    """As much of llama_cpp.Llama as the comparison uses; its next token is the last one plus 1."""

    def __init__(self, path: str, **options: Any):
        self.path, self.options, self.tokens = path, options, list[int]()

    def n_vocab(self) -> int:
        return VOCAB

    def reset(self) -> None:
        self.tokens = []

    def eval(self, tokens: list[int]) -> None:
        self.tokens += tokens
        assert len(self.tokens) <= self.options["n_ctx"]

    def sample(self, temp: float) -> int:
        assert temp == 0
        return (self.tokens[-1] + 1) % VOCAB


def test_measures_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[FakeLlama] = []
    monkeypatch.setitem(
        sys.modules,
        "llama_cpp",
        SimpleNamespace(Llama=lambda *a, **b: made.append(FakeLlama(*a, **b)) or made[-1], __spec__=object()),
    )
    (tmp_path / "a.gguf").touch()
    options = bench.BenchOptions(tmp_path, "bfloat16", 1, prompt_tokens=6, new_tokens=4)
    bench._check_llama(options)
    times = bench._llama(options)()
    assert made[0].path == str(tmp_path / "a.gguf")
    assert (times.steps, len(made[0].tokens)) == (4, 6 + 4)
    assert made[0].tokens[:6] == options.ids(VOCAB)[0].tolist()
    assert made[0].tokens[6:] == [(made[0].tokens[5] + 1 + step) % VOCAB for step in range(4)]
    assert times.prefill > 0
    assert times.decode > 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "directory"])
def test_gguf_files_are_compared_with_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Also those in a directory with their config, as the default model has."""
    tensors = stored_layout(weights(fused=False))
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, tokenizer=byte_level("llama-bpe"))
    default_model._describe(path, tmp_path)
    run_bench(path if place == "file" else tmp_path)
    assert "transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer": "vllm"}, "use transformers or llama.cpp"),
        ({"peer": "llama.cpp", "installed": False}, "pip install llama-cpp-python"),
        ({"peer": "llama.cpp"}, "reads GGUF files"),
        ({"peer": "llama.cpp", "requests": 3}, "leave out --requests"),
        ({"peer": "transformers", "prompt_lookup": 2}, "leave out --mesh"),
    ],
)
def test_rejects_peers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path)
    installed = changes.pop("installed", True)
    monkeypatch.setattr(turns.importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UserError, match=message):
        run_bench(tmp_path, **changes)


def test_rejects_layers_of_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a preset"):
        run_bench(tmp_path, layers=2)


@pytest.fixture
def bench_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Returns a function that measures 20 short prompts in this process and returns the table."""
    monkeypatch.setattr(bench_batch, "LONGEST_PROMPT", 20)
    monkeypatch.setattr(bench_batch, "LONGEST_ANSWER", 8)
    monkeypatch.setattr(bench_batch, "take_turns", turns.take_turns_here)
    write_random_model("causal", small_config(num_hidden_layers=1), tmp_path)

    def table() -> str:
        run_bench(tmp_path, requests=20, rounds=1)
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    return table


def totals(folder: Path) -> str:
    options = bench_batch.BatchBenchOptions(folder, "float32", 20)
    prompts, answers = map(sum, zip(*options.lengths(), strict=True))
    return f"20 prompts of {prompts:,} tokens, {answers:,} tokens"


def test_measures_continuous_batching(
    bench_requests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns.importlib.util, "find_spec", lambda name: None)
    table = bench_requests()
    assert totals(tmp_path) in table
    assert re.search(r"phi3-jax \d+ slots of \d+ ", table)
    with pytest.raises(ValueError, match="has its own prompts"):
        run_bench(tmp_path, requests=20, prompt_lookup=3)


@pytest.mark.live
def test_compares_continuous_with_static_batches(bench_requests: Any, tmp_path: Path) -> None:
    table = bench_requests()
    assert totals(tmp_path) in table
    assert re.search(r"transformers .*sorted,", table)


@pytest.mark.live
def test_static_batch_ends_with_its_longest_answer(tmp_path: Path) -> None:
    import transformers

    Phi3ForCausalLM(small_config(max_position_embeddings=64)).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model.generation_config.eos_token_id = None
    sequences = []

    def generate(*arguments: Any, **options: Any) -> Any:
        sequences.append(type(model).generate(model, *arguments, **options))

    model.generate = generate
    bench_batch.generate_static_batch(model, [([5, 6, 7], 4), ([8], 2)])
    assert sequences[0].shape == (2, 7)
