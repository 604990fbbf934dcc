"""The commands on a tiny model: what comes out where, and how they end."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers
from reference import small_config
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer, cli
from phi3_jax.generation import CompiledModel, Sampling, stream_tokens

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PROMPT = "What is the capital of France?"
NEVER = 299
"""A token that the model has and the tokenizer has not."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 300 tokens whose answers never end by themselves, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROMPT] * 9, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": NEVER}))
    sizes = {"vocab_size": 300, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    Phi3ForCausalLM(small_config(**sizes), rngs=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(model_folder: Path) -> CompiledModel:
    return CompiledModel(Phi3ForCausalLM.from_pretrained(model_folder))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`run("generate", ...)`: the command in this process, as its entry point runs it."""
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda cache_dir: None)

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["phi3-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def generate(run: Any, model_folder: Path) -> Any:
    """`run` of generate on the tiny model, in float32 so that it can be computed again here."""

    def call(*arguments: object, stdin: str = "", model: Path = model_folder) -> Result:
        return run("generate", *arguments, "--model", model, "--dtype", "float32", stdin=stdin)

    return call


def answer(compiled: CompiledModel, folder: Path, prompt: str, count: int, **options: Any) -> str:
    """What generate must print for this prompt, template included; a line end comes after it."""
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode(prompt)
    tokens = list(stream_tokens(compiled, ids, max_new_tokens=count, **options))
    return tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def start(*arguments: object, cache: Path, before: str = "") -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from phi3_jax.cli import main\n{before}\nmain()", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PHI3_JAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
    )


def test_prompt_as_argument_and_from_stdin(
    generate: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    expected = answer(compiled, model_folder, f"<|user|>{PROMPT}<|end|><|assistant|>", 12)
    result = generate(PROMPT, "--max-new-tokens", 12)
    assert result[:2] == (0, expected)
    assert result.err.startswith("[") and " prompt tokens" in result.err and "12 tokens" in result.err  # noqa: PT018
    assert result.err.count("\n") == 1
    assert generate("--max-new-tokens", 12, stdin=PROMPT)[:2] == (0, expected)
    assert generate("-", "--max-new-tokens", 12, stdin=PROMPT)[:2] == (0, expected)


def test_raw_and_system(generate: Any, compiled: CompiledModel, model_folder: Path) -> None:
    raw = generate(PROMPT, "--raw", "--max-new-tokens", 7)
    assert raw[:2] == (0, answer(compiled, model_folder, PROMPT, 7))
    system = generate(PROMPT, "--system", "Be brief.", "--max-new-tokens", 7)
    prompt = f"<|system|>Be brief.<|end|><|user|>{PROMPT}<|end|><|assistant|>"
    assert system[:2] == (0, answer(compiled, model_folder, prompt, 7))
    assert raw.out != system.out


def test_sampling_options_reach_the_sampler(
    generate: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    options = ["--raw", "--max-new-tokens", 12, "--temperature", 1.5, "--top-k", 9, "--top-p", 0.95]
    outs = [generate(PROMPT, *options, "--seed", seed).out for seed in (5, 5, 6)]
    assert outs[0] == outs[1] != outs[2]
    sampling = Sampling(1.5, 9, 0.95)
    assert outs[0] == answer(compiled, model_folder, PROMPT, 12, sampling=sampling, seed=5)


def test_each_end_token_of_generation_config_stops(
    generate: Any, compiled: CompiledModel, model_folder: Path, tmp_path: Path
) -> None:
    ids = Phi3Tokenizer.from_pretrained(model_folder).encode(PROMPT)
    tokens = list(stream_tokens(compiled, ids, max_new_tokens=20))
    first = {token: place for place, token in reversed(list(enumerate(tokens)))}
    early, *_, late = sorted(first, key=first.__getitem__)[1:]
    for path in model_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for ends in ([NEVER, late], [early, late], [late, early], late):
        (tmp_path / "generation_config.json").unlink()
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        made = min(first[end] for end in (ends if isinstance(ends, list) else [ends]) if end in first) + 1
        result = generate(PROMPT, "--raw", "--max-new-tokens", 20, model=tmp_path)
        assert made < 3 or f", {made} tokens, " in result.err
        assert result.out == answer(compiled, model_folder, PROMPT, made)


def test_what_the_user_can_mend_is_one_line(
    generate: Any, run: Any, tmp_path: Path, model_folder: Path
) -> None:
    bare = tmp_path / "bare"
    Phi3ForCausalLM(small_config()).save_pretrained(bare)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    cases = [
        (generate(PROMPT, model=tmp_path / "absent"), "absent"),
        (generate(PROMPT, model=bare), "tokenizer"),
        (generate(PROMPT, model=broken), "broken.gguf"),
        (generate("  "), "the prompt is empty"),
        (generate(stdin=""), "the prompt is empty"),
        (generate(PROMPT, "--raw", "--system", "x"), "--system"),
        (generate(PROMPT, "--top-p", 2, "--temperature", 1), "top_p=2.0"),
        (generate("word " * 4096, "--raw"), "context is 4096"),
        (run("generate", PROMPT, "--model", model_folder, "--dtype", "int4"), "dtype=int4"),
        (run("convert", tmp_path / "absent", tmp_path / "out"), "absent"),
        (run("convert", model_folder, model_folder), "is the checkpoint itself"),
        (run("convert", model_folder, tmp_path / "out", "--dtype", "int8"), "dtype=int8"),
        (run("convert", model_folder, tmp_path / "out", "--max-shard-size", "x"), "max_shard_size='x'"),
        (run("convert", model_folder, "/proc/phi3"), "cannot be written"),
    ]
    for result, message in cases:
        assert result.code == 1, result
        assert result.out == ""
        assert result.err.startswith("phi3-jax: ")
        assert message in result.err
        assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run("generate", PROMPT, "--max-new-tokens", 0).code == 2
    assert run("convert", model_folder, broken).code == 2


def test_other_system_errors_too(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr("phi3_jax.checkpoint.convert_checkpoint", fail)
    assert run("convert", tmp_path, tmp_path / "out") == (
        1,
        "",
        "phi3-jax: [Errno 5] Input/output error: 'disk'\n",
    )


def test_interrupted_while_streaming(model_folder: Path, tmp_path: Path) -> None:
    process = start("generate", PROMPT, "--model", model_folder, "--max-new-tokens", 4000, cache=tmp_path)
    assert process.stdout is not None
    first = process.stdout.read(1)  # an answer has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert first
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert b" prompt tokens" in err


def test_interrupted_before_the_answer(model_folder: Path, tmp_path: Path) -> None:
    process = start(
        *("generate", "-", "--model", model_folder), cache=tmp_path, before="print('up', flush=True)"
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)  # waiting for its input, or about to
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err


def test_reader_that_goes_away(model_folder: Path, tmp_path: Path) -> None:
    command = ("generate", PROMPT, "--model", model_folder, "--max-new-tokens", 4000)
    with start(*command, cache=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert b"Traceback" not in err


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_convert_safetensors(run: Any, model_folder: Path, tmp_path: Path, dtype: str | None) -> None:
    options = ["--dtype", dtype] if dtype else []
    result = run("convert", model_folder, tmp_path / "out", *options)
    assert result.code == 0
    assert result.out == f"{tmp_path / 'out'}: 0.00 GB\n"
    kind = getattr(torch, dtype or "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == kind
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(kind)), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(PROMPT)["input_ids"] == Phi3Tokenizer.from_pretrained(model_folder).encode(PROMPT)
    assert model.generation_config.eos_token_id == NEVER


def test_convert_shards(run: Any, tmp_path: Path) -> None:
    config = small_config(vocab_size=4000, hidden_size=64, head_dim=16)
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "in")
    assert run("convert", tmp_path / "in", tmp_path / "out", "--max-shard-size", "1MB").code == 0
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) >= 3
    assert all(path.stat().st_size < 1_100_000 or len(load_file(path)) == 1 for path in shards)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = load_file(tmp_path / "in" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensor.numpy(), original[name]), name


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama-like file with one layer and a small vocabulary; gives its tensors."""
    rng = np.random.default_rng(0)
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * (len(words) - len(SPECIALS))
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(4)
    writer.add_chat_template(TEMPLATE)
    rows = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 96, "ffn_up": 96}
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (n, 64) for name, n in rows.items()}
    shapes |= {"token_embd": (len(words), 64), "output_norm": (64,), "blk.0.ffn_down": (64, 96)}
    shapes |= {"blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    tensors = {f"{name}.weight": rng.normal(0, 0.2, s).astype(np.float32) for name, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_convert_gguf_and_generate_from_both(run: Any, tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    assert run("convert", tmp_path / "tiny.gguf", tmp_path / "out").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert np.array_equal(state["model.embed_tokens.weight"].numpy(), tensors["token_embd.weight"])
    gate_up = np.concatenate([tensors["blk.0.ffn_gate.weight"], tensors["blk.0.ffn_up.weight"]])
    assert np.array_equal(state["model.layers.0.mlp.gate_up_proj.weight"].numpy(), gate_up)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Hi there")["input_ids"]) == "Hi there"
    results = [
        run("generate", "Hi", "--model", tmp_path / name, "--max-new-tokens", 9, "--dtype", "float32")
        for name in ("tiny.gguf", "out")
    ]
    assert results[0].code == results[1].code == 0
    assert results[0].out == results[1].out


def test_help_is_quick_and_names_the_commands() -> None:
    command = [sys.executable, "-c", "from phi3_jax.cli import main; main()", "--help"]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0
        assert done.stderr == ""
    for name in ("generate", "convert", "bench"):
        assert name in done.stdout
    assert min(times) < 6, times


def test_import_is_light() -> None:
    """No other framework, no network, and little time beside JAX itself."""
    script = textwrap.dedent(
        """
        import json, sys, time
        import jax, flax.nnx
        calls = []
        sys.addaudithook(lambda event, _: calls.append(event) if event.startswith("socket.") else None)
        begin = time.perf_counter()
        import phi3_jax, phi3_jax.cli
        seconds = time.perf_counter() - begin
        heavy = {"torch", "transformers", "tensorflow", "matplotlib", "pandas", "torchvision"}
        print(json.dumps([seconds, sorted(heavy & set(sys.modules)), calls]))
        """
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds, heavy, calls = json.loads(done.stdout)
        assert heavy == []
        assert not {"socket.connect", "socket.bind", "socket.getaddrinfo"} & set(calls)
        times.append(seconds)
    assert min(times) < 2, times
