"""Compiled programs that are kept in a store: a second machine compiles nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import settings_of, write_base, write_rows
from stores import Store

COUNTS = """
import atexit, collections, json, sys
from jax import monitoring

counts = collections.Counter()
monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
atexit.register(lambda: print(json.dumps(counts), file=sys.stderr))
from phi3_jax.cli import main
main()
"""


@pytest.mark.slow
def test_the_second_start_of_a_run_compiles_nothing(stores: Callable[[str], Store], tmp_path: Path) -> None:
    server = stores("gs")
    write_rows(tmp_path / "train.jsonl", 32)
    base = write_base(tmp_path / "model")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f"{server.url}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    counts = []
    for name in ("first", "second"):
        settings = settings_of(tmp_path, base, output_dir=tmp_path / name, max_steps=2, eval_steps=1)
        config = tmp_path / f"{name}.yaml"
        config.write_text(settings.model_dump_json(exclude_defaults=True))  # JSON is YAML
        command = [sys.executable, "-c", COUNTS, "finetune", config]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        counts.append(json.loads(done.stderr.splitlines()[-1]))
    first, second = counts
    assert first["cache_misses"] > 10
    assert second.get("cache_misses", 0) == 0
    assert second["cache_hits"] == second["compile_requests_use_cache"] >= first["cache_misses"]
