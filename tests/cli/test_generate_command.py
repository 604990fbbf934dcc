"""Tests the command `phi3-jax generate` on a tiny model."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import start
from small_checkpoint import NEVER, PROMPT

from phi3_jax import Phi3Tokenizer
from phi3_jax.generation import CompiledModel, generate, stream_tokens


def answer(compiled: CompiledModel, folder: Path, prompt: str, count: int, **options: Any) -> str:
    """Returns the output of generate for this prompt, which includes the template."""
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode(prompt)
    options = {"do_sample": False, "attention_mask": [[1] * len(ids)], "max_new_tokens": count} | options
    tokens = list(stream_tokens(compiled, ids, tokenizer=tokenizer, **options))
    return tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_reads_the_prompt_from_the_argument_or_standard_input(
    generate_command: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    expected = answer(compiled, model_folder, f"<|user|>{PROMPT}<|end|><|assistant|>", 12)
    result = generate_command(PROMPT, "--max-new-tokens", 12)
    assert result[:2] == (0, expected)
    assert result.err.startswith("[") and " prompt tokens" in result.err and "12 tokens" in result.err  # noqa: PT018
    assert result.err.count("\n") == 1
    assert generate_command("--max-new-tokens", 12, stdin=PROMPT)[:2] == (0, expected)
    assert generate_command("-", "--max-new-tokens", 12, stdin=PROMPT)[:2] == (0, expected)


def test_raw_and_system_decide_the_template(
    generate_command: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    raw = generate_command(PROMPT, "--raw", "--max-new-tokens", 7)
    assert raw[:2] == (0, answer(compiled, model_folder, PROMPT, 7))
    system = generate_command(PROMPT, "--system", "Be brief.", "--max-new-tokens", 7)
    prompt = f"<|system|>Be brief.<|end|><|user|>{PROMPT}<|end|><|assistant|>"
    assert system[:2] == (0, answer(compiled, model_folder, prompt, 7))
    assert raw.out != system.out


@pytest.mark.slow
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


@pytest.mark.slow
def test_penalty_lookup_and_stop_reach_generate(
    generate_command: Any, compiled: CompiledModel, model_folder: Path
) -> None:
    options = ["--raw", "--max-new-tokens", 30]
    plain = answer(compiled, model_folder, PROMPT, 30)
    drafted = generate_command(PROMPT, *options, "--prompt-lookup", 3)
    assert drafted[:2] == (0, plain)
    assert "30 tokens" in drafted.err
    penalised = answer(compiled, model_folder, PROMPT, 30, repetition_penalty=2.0)
    assert generate_command(PROMPT, *options, "--repetition-penalty", 2).out == penalised != plain
    end = next(c for c in plain[3:20] if c.isascii() and c.isprintable())
    stopped = generate_command(PROMPT, *options, "--stop", "not this", "--stop", end)
    assert stopped.out == plain[: plain.index(end) + 1] + "\n"


@pytest.mark.slow
def test_prints_the_best_beam(generate_command: Any, compiled: CompiledModel, model_folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(model_folder)
    prompt = "What is the capital"
    ids = tokenizer.encode(prompt)
    (best,) = generate(compiled, [ids], num_beams=3, max_new_tokens=9, do_sample=False)
    result = generate_command(prompt, "--raw", "--num-beams", 3, "--max-new-tokens", 9)
    assert result[:2] == (0, tokenizer.decode(best[len(ids) :], skip_special_tokens=True) + "\n")
    assert result.out != answer(compiled, model_folder, prompt, 9)
    assert result.err.startswith(f"[{len(ids)} prompt tokens, 9 tokens after ")


def test_stops_at_each_end_token_of_the_generation_config(
    generate_command: Any, compiled: CompiledModel, model_folder: Path, tmp_path: Path
) -> None:
    ids = Phi3Tokenizer.from_pretrained(model_folder).encode(PROMPT)
    tokens = list(stream_tokens(compiled, ids, max_new_tokens=20, do_sample=False))
    first = {token: index for index, token in reversed(list(enumerate(tokens)))}
    early, *_, late = sorted(first, key=first.__getitem__)[1:]
    for path in model_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for ends in ([NEVER, late], [early, late], [late, early], late):
        (tmp_path / "generation_config.json").unlink()
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        count = min(first[end] for end in (ends if isinstance(ends, list) else [ends]) if end in first) + 1
        result = generate_command(PROMPT, "--raw", "--max-new-tokens", 20, model=tmp_path)
        assert count < 3 or f", {count} tokens, " in result.err
        assert result.out == answer(compiled, model_folder, PROMPT, count)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer(model_folder: Path, tmp_path: Path) -> None:
    process = start("generate", PROMPT, "--model", model_folder, "--max-new-tokens", 4000, cache=tmp_path)
    assert process.stdout is not None
    first = process.stdout.read(1)  # an answer is under way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert first
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert b" prompt tokens" in err


@pytest.mark.slow
def test_ctrl_c_ends_the_command_before_an_answer(model_folder: Path, tmp_path: Path) -> None:
    process = start(
        *("generate", "-", "--model", model_folder), cache=tmp_path, before="print('up', flush=True)"
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)  # while it loads, or waits for its input
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_does_not_interrupt_imports(model_folder: Path, tmp_path: Path) -> None:
    before = """
import os
from phi3_jax.cli import lazy
load = lazy.import_module
lazy.import_module = lambda name: (os.kill(os.getpid(), signal.SIGINT), load(name), print("loaded"))[1]
"""
    process = start("generate", PROMPT, "--model", model_folder, cache=tmp_path, before=before)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"loaded\n", b"")


def test_a_closed_pipe_ends_the_command(model_folder: Path, tmp_path: Path) -> None:
    command = ("generate", PROMPT, "--model", model_folder, "--max-new-tokens", 4000)
    with start(*command, cache=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert b"Traceback" not in err
