"""The commands on a tiny model: what comes out where, and how they end."""

import importlib.util
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from reference import small_config, write_random_model
from safetensors.numpy import load_file
from small_checkpoint import NEVER, PROMPT, SPECIALS, TEMPLATE, write_checkpoint
from tokenizers import pre_tokenizers

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer, cli
from phi3_jax.cli import common
from phi3_jax.generation import CompiledModel, generate, stream_tokens
from phi3_jax.generation.chat import ChatSession
from phi3_jax.runs import platforms


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(model_folder: Path) -> CompiledModel:
    return CompiledModel(Phi3ForCausalLM.from_pretrained(model_folder))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`run("generate", ...)`: the command in this process, as its entry point runs it."""
    monkeypatch.setattr(common, "keep_compiled_programs", lambda cache_dir: None)

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["phi3-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def generate_command(run: Any, model_folder: Path) -> Any:
    """`run` of generate on the tiny model, in float32 so that it can be computed again here."""

    def call(*arguments: object, stdin: str = "", model: Path = model_folder) -> Result:
        return run("generate", *arguments, "--model", model, "--dtype", "float32", stdin=stdin)

    return call


@pytest.fixture
def chat(run: Any, model_folder: Path) -> Any:
    """`run` of chat on the tiny model: `chat(line, ..., options=[...])`."""

    def call(*lines: str, options: Sequence[object] = (), model: Path = model_folder) -> Result:
        options = ["--model", model, "--dtype", "float32", "--max-new-tokens", 7, *options]
        return run("chat", *options, stdin="".join(f"{line}\n" for line in lines))

    return call


def answer(compiled: CompiledModel, folder: Path, prompt: str, count: int, **options: Any) -> str:
    """What generate must print for this prompt, template included; a line end comes after it."""
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode(prompt)
    options = {"do_sample": False, "attention_mask": [[1] * len(ids)], "max_new_tokens": count} | options
    tokens = list(stream_tokens(compiled, ids, tokenizer=tokenizer, **options))
    return tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


HEEDS_SIGINT = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A process started in the background by a shell ignores SIGINT, and hands that on to its children."""


def start(*arguments: object, cache: Path, before: str = "") -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{HEEDS_SIGINT}from phi3_jax.cli import main\n{before}\nmain()",
            *map(str, arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PHI3_JAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
    )


def test_prompt_as_argument_and_from_stdin(
    generate_command: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    expected = answer(compiled, model_folder, f"<|user|>{PROMPT}<|end|><|assistant|>", 12)
    result = generate_command(PROMPT, "--max-new-tokens", 12)
    assert result[:2] == (0, expected)
    assert result.err.startswith("[") and " prompt tokens" in result.err and "12 tokens" in result.err  # noqa: PT018
    assert result.err.count("\n") == 1
    assert generate_command("--max-new-tokens", 12, stdin=PROMPT)[:2] == (0, expected)
    assert generate_command("-", "--max-new-tokens", 12, stdin=PROMPT)[:2] == (0, expected)


def test_raw_and_system(generate_command: Any, compiled: CompiledModel, model_folder: Path) -> None:
    raw = generate_command(PROMPT, "--raw", "--max-new-tokens", 7)
    assert raw[:2] == (0, answer(compiled, model_folder, PROMPT, 7))
    system = generate_command(PROMPT, "--system", "Be brief.", "--max-new-tokens", 7)
    prompt = f"<|system|>Be brief.<|end|><|user|>{PROMPT}<|end|><|assistant|>"
    assert system[:2] == (0, answer(compiled, model_folder, prompt, 7))
    assert raw.out != system.out


def test_sampling_options_reach_the_sampler(
    generate_command: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    options = ["--raw", "--max-new-tokens", 12, "--temperature", 1.5, "--top-k", 9, "--top-p", 0.95]
    options += ["--min-p", 0.1]
    outs = [generate_command(PROMPT, *options, "--seed", seed).out for seed in (5, 5, 6)]
    assert outs[0] == outs[1] != outs[2]
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.95, "min_p": 0.1, "seed": 5}
    assert outs[0] == answer(compiled, model_folder, PROMPT, 12, **drawn)
    from_all = generate_command(PROMPT, "--raw", "--max-new-tokens", 12, "--temperature", 3, "--seed", 5)
    drawn = {"do_sample": True, "temperature": 3.0, "top_k": 0, "seed": 5}
    assert from_all.out == answer(compiled, model_folder, PROMPT, 12, **drawn)


def test_penalty_lookup_and_stop(generate_command: Any, compiled: CompiledModel, model_folder: Path) -> None:
    options = ["--raw", "--max-new-tokens", 30]
    plain = answer(compiled, model_folder, PROMPT, 30)
    drafted = generate_command(PROMPT, *options, "--prompt-lookup", 3)
    assert drafted[:2] == (0, plain)
    assert "30 tokens" in drafted.err
    penalised = answer(compiled, model_folder, PROMPT, 30, repetition_penalty=2.0)
    assert generate_command(PROMPT, *options, "--repetition-penalty", 2).out == penalised != plain
    place = next(at for at in range(3, 20) if plain[at].isascii() and plain[at].isprintable())
    stopped = generate_command(PROMPT, *options, "--stop", "not this", "--stop", plain[place])
    assert stopped.out == plain[: plain.index(plain[place]) + 1] + "\n"


def test_beams_are_printed_at_the_end(
    generate_command: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(model_folder)
    prompt = "What is the capital"
    ids = tokenizer.encode(prompt)
    (best,) = generate(compiled, [ids], num_beams=3, max_new_tokens=9, do_sample=False)
    result = generate_command(prompt, "--raw", "--num-beams", 3, "--max-new-tokens", 9)
    assert result[:2] == (0, tokenizer.decode(best[len(ids) :], skip_special_tokens=True) + "\n")
    assert result.out != answer(compiled, model_folder, prompt, 9)
    assert result.err.startswith(f"[{len(ids)} prompt tokens, 9 tokens after ")


def test_each_end_token_of_generation_config_stops(
    generate_command: Any, compiled: CompiledModel, model_folder: Path, tmp_path: Path
) -> None:
    ids = Phi3Tokenizer.from_pretrained(model_folder).encode(PROMPT)
    tokens = list(stream_tokens(compiled, ids, max_new_tokens=20, do_sample=False))
    first = {token: place for place, token in reversed(list(enumerate(tokens)))}
    early, *_, late = sorted(first, key=first.__getitem__)[1:]
    for path in model_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for ends in ([NEVER, late], [early, late], [late, early], late):
        (tmp_path / "generation_config.json").unlink()
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        made = min(first[end] for end in (ends if isinstance(ends, list) else [ends]) if end in first) + 1
        result = generate_command(PROMPT, "--raw", "--max-new-tokens", 20, model=tmp_path)
        assert made < 3 or f", {made} tokens, " in result.err
        assert result.out == answer(compiled, model_folder, PROMPT, made)


def test_what_the_user_can_mend_is_one_line(
    generate_command: Any, run: Any, tmp_path: Path, model_folder: Path
) -> None:
    bare = tmp_path / "bare"
    Phi3ForCausalLM(small_config()).save_pretrained(bare)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    cases = [
        (generate_command(PROMPT, model=tmp_path / "absent"), "absent"),
        (generate_command(PROMPT, model=bare), "tokenizer"),
        (generate_command(PROMPT, model=broken), "broken.gguf"),
        (generate_command("  "), "the prompt is empty"),
        (generate_command(stdin=""), "the prompt is empty"),
        (generate_command(PROMPT, "--raw", "--system", "x"), "--system"),
        (generate_command(PROMPT, "--top-p", 2, "--temperature", 1), "top_p=2.0"),
        (generate_command(PROMPT, "--top-p", 0.5), "--top-p 0.5 does nothing without draws; add --temp"),
        (generate_command(PROMPT, "--num-beams", 2, "--prompt-lookup", 2), "exclude each other"),
        (generate_command(PROMPT, "--repetition-penalty", 0), "repetition_penalty=0.0"),
        (generate_command("word " * 4096, "--raw"), "context is 4096"),
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
    assert run("chat", "--max-new-tokens", 0).code == 2
    assert run("convert", model_folder, broken).code == 2


def said(compiled: CompiledModel, folder: Path, *questions: str, **options: Any) -> list[str]:
    """The answers that chat must print."""
    options = {"seed": 0, "max_new_tokens": 7, "do_sample": False} | options
    session = ChatSession(compiled, Phi3Tokenizer.from_pretrained(folder), **options)
    return ["".join(session.reply(question)) for question in questions]


def test_chat_in_a_pipe(chat: Any, compiled: CompiledModel, model_folder: Path) -> None:
    first, second = said(compiled, model_folder, PROMPT, "And why?")
    result = chat(PROMPT, "", "  And why? ")
    assert result[:2] == (0, f"{first}\n{second}\n")
    assert result.err == 2 * "[cut off after 7 tokens; --max-new-tokens sets how many]\n"
    assert f"{second}\n" == chat("And why?").out or second != said(compiled, model_folder, "And why?")[0]
    assert chat() == (0, "", "")

    told = said(compiled, model_folder, PROMPT, system="Be brief.")
    assert chat(PROMPT, options=["--system", "Be brief."]).out == f"{told[0]}\n" != f"{first}\n"
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 9, "seed": 5}
    options = ["--temperature", 1.5, "--top-k", 9, "--seed", 5]
    answers = said(compiled, model_folder, PROMPT, PROMPT, **drawn)
    assert chat(PROMPT, PROMPT, options=options).out == "".join(f"{text}\n" for text in answers)


def test_chat_commands(chat: Any, compiled: CompiledModel, model_folder: Path, tmp_path: Path) -> None:
    first, second = said(compiled, model_folder, PROMPT, "And why?")
    (told,) = said(compiled, model_folder, PROMPT, system="Be brief.")
    file = tmp_path / "a talk.json"
    result = chat(
        "/help",
        PROMPT,
        f"/save {file}",
        "/reset",
        "/system Be brief.",
        PROMPT,
        f"/load {file}",
        "And why?",
        "/exit",
        "And how?",
    )
    assert result[:2] == (0, f"{first}\n{told}\n{second}\n")
    for line in ("/load FILE", "[2 messages written]", "[a new conversation]", "[2 messages read]"):
        assert line in result.err
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][1]["content"] == first
    assert chat("/system Be brief.", "/system", PROMPT).out == f"{first}\n"
    (literal,) = said(compiled, model_folder, "/help")
    assert chat(" /help").out == f"{literal}\n"


def test_chat_in_a_pipe_ends_at_an_error(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    cases = {
        "/frobnicate": "there is no command /frobnicate; /help lists them",
        "/save": "/save needs a file: /save FILE",
        "/load ": "/load needs a file",
        f"/load {tmp_path / 'absent.json'}": "absent.json",
        f"/load {tmp_path / 'broken.json'}": "broken.json is not a saved conversation",
        f"/save {tmp_path / 'absent' / 'talk.json'}": "absent",
        "word " * 4096: "the model's context of 4096 leaves no room for an answer",
    }
    for line, message in cases.items():
        result = chat(line, PROMPT)
        assert (result.code, result.out) == (1, ""), line
        assert result.err.startswith("phi3-jax: ")
        assert message in result.err
        assert result.err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_chat_in_a_terminal(model_folder: Path, tmp_path: Path) -> None:
    """A prompt, errors that are told, Ctrl-C within an answer and at the prompt."""
    here, there = os.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", f"{HEEDS_SIGINT}from phi3_jax.cli import main\nmain()", "-v", "chat"),
            *("--model", str(model_folder), "--max-new-tokens", "4000"),
        ],
        stdin=there,
        stdout=there,
        stderr=there,
        env=os.environ | {"PHI3_JAX_CACHE": str(tmp_path), "TERM": "dumb"},
    )
    os.close(there)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while text not in seen:
            assert select.select([here], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(here, 4096).decode(errors="replace")
        seen = seen.split(text, 1)[1]

    try:
        wait_for("/help lists the commands")
        wait_for("> ")
        os.write(here, b"/frobnicate\n")
        wait_for("there is no command /frobnicate")
        wait_for("> ")
        os.write(here, b"Hi\n")
        wait_for("\n")  # the line that was typed
        while len(seen) < 20:  # an answer is under way
            seen += os.read(here, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        wait_for("0 of them cached")
        wait_for("> ")
        os.write(here, b"Hi\n")
        wait_for("\n")
        while len(seen) < 20:
            seen += os.read(here, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        wait_for(" of them cached")
        wait_for("> ")
        time.sleep(0.5)  # it is waiting for a line, or about to
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(here)


def test_other_system_errors_too(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr("phi3_jax.cli.convert.convert_checkpoint", fail)
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


DTYPES = pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])


def convert(run: Any, source: Path, out: Path, dtype: str | None) -> None:
    result = run("convert", source, out, *(["--dtype", dtype] if dtype else []))
    assert result.code == 0
    assert result.out == f"{out}: 0.00 GB\n"


@DTYPES
def test_convert_safetensors(run: Any, model_folder: Path, tmp_path: Path, dtype: str | None) -> None:
    out = tmp_path / "out"
    convert(run, model_folder, out, dtype)
    original, written = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == jnp.dtype(dtype or "float32")
        assert np.array_equal(written[name], tensor.astype(written[name].dtype)), name
    assert json.loads((out / "config.json").read_text())["dtype"] == (dtype or "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model_folder / name).read_bytes()


@pytest.mark.live
@DTYPES
def test_transformers_loads_what_convert_writes(
    run: Any, model_folder: Path, tmp_path: Path, dtype: str | None
) -> None:
    import torch
    import transformers

    convert(run, model_folder, tmp_path / "out", dtype)
    kind = getattr(torch, dtype or "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == kind
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(kind)), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(PROMPT)["input_ids"] == Phi3Tokenizer.from_pretrained(model_folder).encode(PROMPT)
    assert model.generation_config.eos_token_id == NEVER


def convert_to_shards(run: Any, folder: Path) -> dict[str, np.ndarray]:
    """Converts a model to several files in `out`; gives its tensors."""
    config = small_config(vocab_size=4000, hidden_size=64, head_dim=16)
    write_random_model("causal", config, folder / "in")
    assert run("convert", folder / "in", folder / "out", "--max-shard-size", "1MB").code == 0
    shards = sorted((folder / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) >= 3
    assert all(path.stat().st_size < 1_100_000 or len(load_file(path)) == 1 for path in shards)
    return load_file(folder / "in" / "model.safetensors")


def test_convert_shards(run: Any, tmp_path: Path) -> None:
    original = convert_to_shards(run, tmp_path)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == original.keys()
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / "out" / file)[name], original[name]), name


@pytest.mark.live
def test_transformers_loads_shards_that_convert_writes(run: Any, tmp_path: Path) -> None:
    import transformers

    original = convert_to_shards(run, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
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
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(written["model.embed_tokens.weight"], tensors["token_embd.weight"])
    gate_up = np.concatenate([tensors["blk.0.ffn_gate.weight"], tensors["blk.0.ffn_up.weight"]])
    assert np.array_equal(written["model.layers.0.mlp.gate_up_proj.weight"], gate_up)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Hi there")) == "Hi there"
    results = [
        run("generate", "Hi", "--model", tmp_path / name, "--max-new-tokens", 9, "--dtype", "float32")
        for name in ("tiny.gguf", "out")
    ]
    assert results[0].code == results[1].code == 0
    assert results[0].out == results[1].out


@pytest.mark.live
def test_transformers_loads_a_converted_gguf(run: Any, tmp_path: Path) -> None:
    import transformers

    write_gguf(tmp_path / "tiny.gguf")
    assert run("convert", tmp_path / "tiny.gguf", tmp_path / "out").code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.state_dict().keys() - written.keys() <= {"lm_head.weight"}
    for name, tensor in written.items():
        assert np.array_equal(model.state_dict()[name].numpy(), tensor), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Hi there")["input_ids"]) == "Hi there"


def least_seconds(measure: Callable[[], float], limit: float) -> float:
    """The least of up to three measurements; one below the limit is enough."""
    times: list[float] = []
    while len(times) < 3 and not (times and times[-1] < limit):
        times.append(measure())
    return min(times)


def test_help_is_quick_and_names_the_commands() -> None:
    command = [sys.executable, "-c", f"{HEEDS_SIGINT}from phi3_jax.cli import main\nmain()", "--help"]

    def seconds() -> float:
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stderr == ""
        for name in ("generate", "chat", "convert", "bench"):
            assert name in done.stdout
        return time.perf_counter() - begin

    assert least_seconds(seconds, 6) < 6


def test_import_is_light() -> None:
    """No other framework, no network, and little time beside JAX itself."""
    script = textwrap.dedent(
        """
        import json, sys, time
        import jax, flax.nnx
        calls = []
        sys.addaudithook(lambda event, _: calls.append(event) if event.startswith("socket.") else None)
        begin = time.process_time()
        import phi3_jax, phi3_jax.cli
        for name in phi3_jax.__all__:
            getattr(phi3_jax, name)
        seconds = time.process_time() - begin
        heavy = {"torch", "transformers", "tensorflow", "matplotlib", "pandas", "torchvision"}
        print(json.dumps([seconds, sorted(heavy & set(sys.modules)), calls]))
        """
    )

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        measured, heavy, calls = json.loads(done.stdout)
        assert heavy == []
        assert not {"socket.connect", "socket.bind", "socket.getaddrinfo"} & set(calls)
        return measured

    assert least_seconds(seconds, 2) < 2


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.skipif(platforms.has_tpu(), reason="there is a TPU")
def test_absent_tpu_is_not_looked_for(model_folder: Path, tmp_path: Path) -> None:
    """Where libtpu is installed, it neither complains nor is it loaded."""
    script = """
        import atexit, sys
        atexit.register(lambda: print("libtpu" in open("/proc/self/maps").read(), file=sys.stderr))
        from phi3_jax.cli import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), "generate", "Hi", "--max-new-tokens", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [*command, "--model", str(model_folder)],
        env=environment | {"PHI3_JAX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    figures, loaded = done.stderr.splitlines()
    assert re.fullmatch(r"\[\d+ prompt tokens, .* 2 tokens\]", figures)
    assert loaded == "False"
