"""`python -m phi3_jax.train`: the same program as `phi3-jax finetune`."""

import json
import subprocess
import sys

import pytest
from runs import losses, run, settings_of, write_base, write_rows


@pytest.mark.slow
def test_runs_the_settings_of_a_file(tmp_path):
    base = write_base(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(settings_of(tmp_path, base, max_steps=2).model_dump_json(exclude_defaults=True))
    command = [sys.executable, "-m", "phi3_jax.train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(tmp_path)] == [1, 2]
    results = run(tmp_path, base, max_steps=2)  # finished, with these very settings
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in results["validation"].items())
    assert done.stdout.splitlines()[0] == f"validation: {numbers}"
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert summary["settings"]["command"] == f"python -m phi3_jax.train {config}"
