"""Runs killed at any moment: the same command resumes them, with the same losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from commands import HIDES_TORCH
from forks import Forks
from runs import losses, write_base, write_rows
from stores import open_store

from phi3_jax.storage.targets import names_in

pytestmark = pytest.mark.slow

KILLS = 20


MODULES = (
    *("phi3_jax.cli.finetune", "phi3_jax.train.finetune", "phi3_jax.train.report", "tensorboardX"),
    *("orbax.checkpoint", "pyarrow.parquet", "matplotlib.pyplot", "tokenizers", "gcsfs"),
)


def arguments(base, folder, output, steps=60):
    settings = {
        "--model": base,
        "--train-file": folder / "train.jsonl",
        "--output-dir": f"{output}/run",
        "--dtype": "float32",
        "--train-batch-size": 8,
        "--max-steps": steps,
        "--eval-steps": steps // 3,
        "--save-steps": 3,
        "--max-buckets": 2,
        "--cache-dir": folder / "cache",
    }
    return ["finetune", *(str(word) for pair in settings.items() for word in pair)]


def finish(forks, *given):
    """Runs a command to its end, and returns the seconds that it takes."""
    started = time.monotonic()
    process = forks.start(*given)
    text = process.text()
    assert process.returncode == 0, text
    return time.monotonic() - started


def kill_and_end(forks, given, alive):
    """Kills the run at random moments of the `alive` seconds that it takes, and lets it end after that."""
    draws = random.Random(7)
    for _ in range(KILLS):
        process = forks.start(*given)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draws.uniform(0.1, 1.0) * alive)
        process.kill()
        text = process.text()
        assert process.returncode in (0, -signal.SIGKILL), text
    finish(forks, *given)


def test_twenty_kills(tmp_path):
    """Kills the run at random moments, its start and its end included."""
    base = write_base(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 96)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Forks(MODULES, tmp_path, os.environ | {"JAX_PLATFORMS": "cpu"}) as forks:
        # The first run compiles, and takes longer than all others.
        finish(forks, *arguments(base, tmp_path, tmp_path / "compiled"))
        alive = finish(forks, *arguments(base, tmp_path, whole))
        kill_and_end(forks, arguments(base, tmp_path, killed), alive)
    assert losses(killed) == losses(whole)
    assert sorted(path.name for path in (killed / "run").iterdir()) == sorted(
        path.name for path in (whole / "run").iterdir()
    )
    for name in ("model.safetensors", "config.json"):
        assert (killed / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    checkpoints = {path.name for path in (killed / "run" / "checkpoints").iterdir()}
    assert checkpoints == {path.name for path in (whole / "run" / "checkpoints").iterdir()}


def test_twenty_kills_of_a_run_in_a_store(tmp_path, monkeypatch):
    base = write_base(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 96)
    monkeypatch.setenv("PHI3_JAX_CACHE", str(tmp_path / "cache"))
    whole = tmp_path / "whole"
    with (
        open_store("gs") as store,
        Forks(MODULES, tmp_path, os.environ | {"JAX_PLATFORMS": "cpu"}) as forks,
    ):
        finish(forks, *arguments(base, tmp_path, whole, steps=30))
        alive = finish(forks, *arguments(base, tmp_path, f"{store.url}/compiled", steps=30))
        kill_and_end(forks, arguments(base, tmp_path, f"{store.url}/killed", steps=30), alive)
        records = [json.loads(line) for line in store.get("killed/run/log.jsonl").splitlines()]
        killed = [(each["step"], each["loss"]) for each in records if each["kind"] == "train"]
        assert killed == losses(whole)
        assert names_in(f"{store.url}/killed/run") == sorted(path.name for path in (whole / "run").iterdir())
        for name in ("model.safetensors", "config.json"):
            assert store.get(f"killed/run/{name}") == (whole / "run" / name).read_bytes()
        assert len(names_in(f"{store.url}/killed/run/checkpoints")) <= 3
    assert list((tmp_path / "cache" / "outputs").iterdir()) == []


def start(base, folder, output):
    """Starts a run in a process of its own."""
    code = f"{HIDES_TORCH}from phi3_jax.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments(base, folder, output)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_sigterm_saves_first(tmp_path):
    base = write_base(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 96)
    process = start(base, tmp_path, tmp_path / "ended")
    log = tmp_path / "ended" / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "which is saved; the same command resumes the run from there" in error
    process = start(base, tmp_path, tmp_path / "ended")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "resuming after step" in error
    assert [step for step, _ in losses(tmp_path / "ended")] == list(range(1, 61))
