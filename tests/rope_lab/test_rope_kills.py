"""`phi3-jax rope search`, killed several times, ends with the same result."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-c", "from phi3_jax.cli import main; main()", "rope", "search")
KILLS = 6


def start(folder: Path, output: Path) -> "subprocess.Popen[str]":
    options = {
        "model": folder / "model",
        "text": folder / "text.txt",
        "output": output,
        "lengths": 512,
        "method": "evolution",
        "population": 8,
        "iterations": 4,
        "initial-tokens": "0,4",
        "batch-size": 2,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PHI3_JAX_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [*COMMAND, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_resumes_to_the_same_result(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    sizes = {"max_position_embeddings": 256, "original_max_position_embeddings": 256}
    write_checkpoint(tmp_path / "model", pad_token_id=0, **sizes)
    draws = random.Random(3)
    words = ["What", "is", "the", "capital", "of", "France?"]
    (tmp_path / "text.txt").write_text(" ".join(draws.choice(words) for _ in range(1500)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(tmp_path, tmp_path / "warm").communicate(timeout=300)  # fills the compilation cache
    started = time.monotonic()
    process = start(tmp_path, whole)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "perplexity" in out
    seconds = time.monotonic() - started

    def check() -> None:
        assert {
            name: data for name, data in contents(killed).items() if name != ".state.json.lock"
        } == contents(whole)

    kills = 0
    while kills < KILLS:
        process = start(tmp_path, killed)
        try:
            process.wait(timeout=draws.uniform(0.4, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
        kills += process.returncode != 0
        if process.returncode == 0:  # before its kill
            check()
            killed, seconds = killed.with_name(f"{killed.name}-"), 0.8 * seconds
    process = start(tmp_path, killed)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    check()
