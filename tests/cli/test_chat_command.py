"""Tests the command `phi3-jax chat` on a tiny model."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import HEEDS_SIGINT, Result
from small_checkpoint import PROMPT

from phi3_jax import Phi3Tokenizer
from phi3_jax.generation import CompiledModel
from phi3_jax.generation.chat import ChatSession


@pytest.fixture
def chat(run: Any, model_folder: Path) -> Any:
    """Runs chat on the tiny model, as in `chat(line, ..., options=[...])`."""

    def call(*lines: str, options: Sequence[object] = (), model: Path = model_folder) -> Result:
        options = ["--model", model, "--dtype", "float32", "--max-new-tokens", 7, *options]
        return run("chat", *options, stdin="".join(f"{line}\n" for line in lines))

    return call


def answers(compiled: CompiledModel, folder: Path, *questions: str, **options: Any) -> list[str]:
    """Returns the answers that chat prints."""
    options = {"seed": 0, "max_new_tokens": 7, "do_sample": False} | options
    session = ChatSession(compiled, Phi3Tokenizer.from_pretrained(folder), **options)
    return ["".join(session.reply(question)) for question in questions]


@pytest.mark.slow
def test_chat_answers_lines_of_a_pipe(chat: Any, compiled: CompiledModel, model_folder: Path) -> None:
    first, second = answers(compiled, model_folder, PROMPT, "And why?")
    result = chat(PROMPT, "", "  And why? ")
    assert result[:2] == (0, f"{first}\n{second}\n")
    assert result.err == 2 * "[cut off after 7 tokens; --max-new-tokens sets how many]\n"
    assert f"{second}\n" == chat("And why?").out or second != answers(compiled, model_folder, "And why?")[0]
    assert chat() == (0, "", "")

    brief = answers(compiled, model_folder, PROMPT, system="Be brief.")
    assert chat(PROMPT, options=["--system", "Be brief."]).out == f"{brief[0]}\n" != f"{first}\n"
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 9, "seed": 5}
    options = ["--temperature", 1.5, "--top-k", 9, "--seed", 5]
    both = answers(compiled, model_folder, PROMPT, PROMPT, **drawn)
    assert chat(PROMPT, PROMPT, options=options).out == "".join(f"{text}\n" for text in both)


def test_chat_obeys_commands(chat: Any, compiled: CompiledModel, model_folder: Path, tmp_path: Path) -> None:
    first, second = answers(compiled, model_folder, PROMPT, "And why?")
    (brief,) = answers(compiled, model_folder, PROMPT, system="Be brief.")
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
    assert result[:2] == (0, f"{first}\n{brief}\n{second}\n")
    for line in ("/load FILE", "[2 messages written]", "[a new conversation]", "[2 messages read]"):
        assert line in result.err
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][1]["content"] == first
    assert chat("/system Be brief.", "/system", PROMPT).out == f"{first}\n"
    (literal,) = answers(compiled, model_folder, "/help")
    assert chat(" /help").out == f"{literal}\n"


def test_chat_in_a_pipe_ends_at_an_error(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    cases = {
        "/frobnicate": "there is no command /frobnicate; /help lists them",
        "/save": "/save needs a file: /save FILE",
        "/load ": "/load needs a file",
        f"/load {tmp_path / 'absent.json'}": "absent.json",
        f"/load {tmp_path / 'broken.json'}": "broken.json is not valid JSON",
        f"/save {tmp_path / 'absent' / 'talk.json'}": "absent",
        "word " * 4096: "the model's context of 4096 leaves no room for an answer",
    }
    for line, message in cases.items():
        result = chat(line, PROMPT)
        assert (result.code, result.out) == (1, ""), line
        assert result.err.startswith("phi3-jax: ")
        assert message in result.err
        assert result.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_chat_in_a_terminal(model_folder: Path, tmp_path: Path) -> None:
    """It prints a prompt and errors, and heeds Ctrl-C within an answer and at the prompt."""
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
        time.sleep(0.5)  # until it waits for a line
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(here)
