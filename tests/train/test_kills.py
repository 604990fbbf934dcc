"""Runs killed at any moment: the same command resumes them, with the same losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from commands import HIDES_TORCH
from runs import losses, write_base, write_rows
from stores import open_store

from phi3_jax.storage.targets import names_in

pytestmark = pytest.mark.slow

KILLS = 20


def command(base, folder, output):
    settings = {
        "--model": base,
        "--train-file": folder / "train.jsonl",
        "--output-dir": f"{output}/run",
        "--dtype": "float32",
        "--train-batch-size": 8,
        "--max-steps": 60,
        "--eval-steps": 20,
        "--save-steps": 3,
        "--max-buckets": 2,
        "--cache-dir": folder / "cache",
    }
    words = [str(word) for pair in settings.items() for word in pair]
    code = f"{HIDES_TORCH}from phi3_jax.cli import main\nmain()"
    return [sys.executable, "-c", code, "finetune", *words]


def start(base, folder, output):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command(base, folder, output),
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_and_end(base, folder, output, alive):
    """Kills the run at random moments of the `alive` seconds that it takes, and lets it end after that."""
    draws = random.Random(7)
    for _ in range(KILLS):
        process = start(base, folder, output)
        try:
            process.wait(timeout=draws.uniform(0.2, 1.0) * alive)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
    process = start(base, folder, output)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def test_twenty_kills(tmp_path):
    """Kills the run at random moments, its start and its end included."""
    base = write_base(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 96)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for output in (tmp_path / "compiled", whole):  # the first run compiles, and takes longer than all others
        started = time.monotonic()
        process = start(base, tmp_path, output)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        alive = time.monotonic() - started
    kill_and_end(base, tmp_path, killed, alive)
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
    with open_store("gs") as store:
        process = start(base, tmp_path, whole)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        started = time.monotonic()
        process = start(base, tmp_path, f"{store.url}/compiled")
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        kill_and_end(base, tmp_path, f"{store.url}/killed", time.monotonic() - started)
        records = [json.loads(line) for line in store.get("killed/run/log.jsonl").splitlines()]
        killed = [(each["step"], each["loss"]) for each in records if each["kind"] == "train"]
        assert killed == losses(whole)
        assert names_in(f"{store.url}/killed/run") == sorted(path.name for path in (whole / "run").iterdir())
        for name in ("model.safetensors", "config.json"):
            assert store.get(f"killed/run/{name}") == (whole / "run" / name).read_bytes()
        assert len(names_in(f"{store.url}/killed/run/checkpoints")) <= 3
    assert list((tmp_path / "cache" / "outputs").iterdir()) == []


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
