"""Tests what all commands share: help, imports, errors."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference import small_config
from small_checkpoint import PROMPT

from phi3_jax import Phi3ForCausalLM
from phi3_jax.cli import app, options, rope
from phi3_jax.runs import platforms


def test_an_error_that_the_user_can_mend_is_one_line(
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
        (generate_command(PROMPT, "--num-beams", 10**7), "10,000,000 rows of 640 tokens need 2,288"),
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


def test_a_system_error_is_one_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr("phi3_jax.cli.convert.convert_checkpoint", fail)
    assert run("convert", tmp_path, tmp_path / "out") == (
        1,
        "",
        "phi3-jax: [Errno 5] Input/output error: 'disk'\n",
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("of 8 GiB"), "there is not enough memory (of 8 GiB)"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nat"), "a device (RESOURCE_EXHAUSTED: 9 GiB)"),
    ],
)
def test_full_memory_is_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("phi3_jax.cli.convert.convert_checkpoint", fail)
    result = run("convert", tmp_path, tmp_path / "out")
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("wrong"), ValueError("wrong"), RuntimeError("wrong")])
def test_a_programming_error_keeps_its_traceback(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("phi3_jax.cli.convert.convert_checkpoint", fail)
    with pytest.raises(type(error), match="wrong"):
        run("convert", tmp_path, tmp_path / "out")


def least_seconds(measure: Callable[[], float], limit: float) -> float:
    """Returns the least of up to three measurements; stops at the first below the limit."""
    times: list[float] = []
    while len(times) < 3 and not (times and times[-1] < limit):
        times.append(measure())
    return min(times)


def test_help_is_quick_and_names_the_commands() -> None:
    """`phi3-jax --help` imports no framework; the seconds are those of the process, not of the clock."""
    script = """
        import atexit, json, sys, time
        heavy = {"jax", "jaxlib", "flax", "transformers", "torch", "numpy"}
        report = lambda: [time.process_time(), sorted(heavy & set(sys.modules))]
        atexit.register(lambda: print(json.dumps(report()), file=sys.stderr))
        from phi3_jax.cli import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), "--help"]

    def seconds() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert all(name in done.stdout for name in app.COMMANDS)
        measured, heavy = json.loads(done.stderr)
        assert heavy == []
        return measured

    assert least_seconds(seconds, 1.5) < 1.5


@pytest.mark.parametrize(
    ("group", "name", "line"),
    [((), *command) for command in app.COMMANDS.items()]
    + [(("rope",), *command) for command in rope.COMMANDS.items()],
)
def test_help_of_a_command_begins_with_its_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, group: tuple[str, ...], name: str, line: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*group, name, "--help")
    assert result.code == 0
    usage, help_, *_ = re.split(r"\n\s*\n", result.out.strip())
    assert f" {' '.join((*group, name))} " in usage
    assert help_.strip() == line
    assert "--install-completion" not in result.out


def test_import_is_light() -> None:
    """It imports no other framework, uses no network, and takes little time beside JAX itself."""
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
    """Where libtpu is installed, it is not loaded and prints nothing."""
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
    statistics, loaded = done.stderr.splitlines()
    assert re.fullmatch(r"\[\d+ prompt tokens, .* 2 tokens\]", statistics)
    assert loaded == "False"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("64,x", "--lengths 64,x: 'x' is not a whole number"),
        ("64,1", "--lengths 64,1: 1 must be at least 2"),
        ("64,2147483648", "--lengths 64,2147483648: 2147483648 must be below 2**31"),
        ("9" * 400, f"--lengths {'9' * 40}: {'9' * 20} must be below 2**31"),
    ],
)
def test_names_a_number_of_a_list_that_cannot_be_used(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        options.numbers("lengths", text, least=2)


@pytest.mark.parametrize(
    "words",
    [
        ("rope", "critical", "--text", "x", "--output", "y", "--length"),
        ("plan", "--model", "m", "--topology", "v5e:1x1", "--seq"),
        ("classify", "--model", "m", "--input", "i", "--output", "o.csv", "--batch-size"),
        ("finetune", "--max-steps"),
    ],
)
def test_names_a_number_that_int32_cannot_hold(run: Any, words: tuple[str, ...]) -> None:
    for number in (2**31, 10**20):
        result = run(*words, number)
        assert (result.code, result.err) == (1, f"phi3-jax: {words[-1]} {number} must be below 2**31\n")
