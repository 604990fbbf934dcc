"""`phi3-jax finetune` in two processes with two devices each, compared with one process and one device."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import HIDES_TORCH
from pair import Ended, run_pair
from phi3_jax.train.finetune import finetune
from phi3_jax.train.mirror import committed_steps
from runs import losses, settings_of, write_base, write_rows
from safetensors.numpy import load_file
from stores import open_store

from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.storage.targets import files_below

OPTIONS: dict[str, Any] = {"max_steps": 8, "eval_steps": 4, "max_buckets": 2}
IMPATIENT = "from phi3_jax.parallel import heartbeats\nheartbeats.SILENT_BEATS = 2\n"
COMMAND = ("-c", f"{HIDES_TORCH}from phi3_jax.cli import main\nmain()", "finetune")
PROGRAM = ("-m", "phi3_jax.train")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return write_base(folder / "model")


def run_both(
    base: Path,
    data: Path,
    folder: Path,
    mesh: str,
    *,
    watch: Any = None,
    command: Sequence[str] = COMMAND,
    **changes: Any,
) -> list[Ended]:
    folder.mkdir(exist_ok=True)
    settings = settings_of(data, base, **{"output_dir": folder / "run"} | OPTIONS | changes)
    config = folder / "config.yaml"
    config.write_text(settings.model_dump_json(exclude_defaults=True))  # JSON is YAML
    arguments = [*command, config, "--distributed", "--mesh", mesh]
    environment = {"PHI3_JAX_CACHE": str(data / "cache")}
    return run_pair(arguments, arguments, logs=folder, timeout=400, environment=environment, watch=watch)


@pytest.mark.parametrize(
    ("mesh", "task", "changes"),
    [
        ("fsdp=4", "sequence-classification", {"gradient_accumulation_steps": 2}),
        ("data=2,tensor=2", "token-classification", {"trained": "lora"}),
        ("fsdp=2,tensor=2", "causal-lm", {"packing": True, "messages_column": "messages"}),
    ],
    ids=["sequence", "tokens-lora", "packed"],
)
def test_two_processes_match_one(
    base: Path, tmp_path: Path, mesh: str, task: str, changes: dict[str, Any]
) -> None:
    write_rows(tmp_path / "train.jsonl", 64, task)
    changes = {"task": task, **changes}
    alone = tmp_path / "alone"
    expected = finetune(
        settings_of(tmp_path, base, output_dir=alone / "run", **OPTIONS | changes), show=False
    )

    ended = run_both(base, tmp_path, tmp_path / "both", mesh, **changes)
    assert [one.code for one in ended] == [0, 0], ended
    assert "validation: " in ended[0].out
    assert ended[1].out == ""
    steps, together = zip(*losses(tmp_path / "both"), strict=True)
    steps_alone, losses_alone = zip(*losses(alone), strict=True)
    assert steps == steps_alone
    np.testing.assert_allclose(together, losses_alone, rtol=1e-5)
    loss = float(ended[0].out.split("loss ")[1].split(",")[0])
    assert loss == pytest.approx(expected["validation"]["loss"], abs=1e-4)  # printed with four digits
    mine, other = (load_file(where / "run" / "model.safetensors") for where in (tmp_path / "both", alone))
    assert mine.keys() == other.keys()
    for name in mine:
        assert np.linalg.norm(mine[name] - other[name]) <= 1e-4 * np.linalg.norm(other[name]), name


LONG = {"max_steps": 24, "eval_steps": 12}


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "train.jsonl", 64)
    ended = run_both(base, folder, folder, "fsdp=4", command=PROGRAM, **LONG)
    assert [one.code for one in ended] == [0, 0], ended
    return folder


def test_sigterm_in_process_0_saves_in_both_and_the_same_command_resumes(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", 64)
    cut = tmp_path / "cut"
    log, sent = cut / "run" / "log.jsonl", []

    def end_one(processes: Any) -> None:
        if not sent and log.exists() and log.stat().st_size:
            os.kill(processes[0].pid, signal.SIGTERM)
            sent.append(0)

    ended = run_both(base, tmp_path, cut, "fsdp=4", watch=end_one, **LONG)
    assert [one.code for one in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "which is saved; the same command resumes the run from there" in ended[0].err
    assert 0 < len(losses(cut)) < 24
    ended = run_both(base, tmp_path, cut, "fsdp=4", **LONG)
    assert [one.code for one in ended] == [0, 0], ended
    assert losses(cut) == losses(whole)
    for name in ("model.safetensors", "config.json"):
        assert (cut / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()


def test_a_process_that_loses_the_other_one_ends_soon_and_one_process_resumes(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    """Process 1 is killed without a word; the run goes on with other devices, all of one process."""
    write_rows(tmp_path / "train.jsonl", 64)
    cut = tmp_path / "cut"
    log, ended_at = cut / "run" / "log.jsonl", list[float]()

    def kill_one(processes: Any) -> None:
        saved = log.exists() and len(losses(cut)) > 12
        if not ended_at and saved:
            processes[1].kill()
            ended_at.append(time.monotonic())

    command = ("-c", f"{HIDES_TORCH}{IMPATIENT}from phi3_jax.cli import main\nmain()", "finetune")
    ended = run_both(base, tmp_path, cut, "fsdp=4", watch=kill_one, command=command, **LONG)
    assert time.monotonic() - ended_at[0] < 40
    assert ended[0].code == os.EX_TEMPFAIL, ended[0]
    line = ended[0].err.splitlines()[-1]
    assert line.startswith("phi3-jax (process 0): process 1 on "), line
    assert "has given no sign of life for 10 seconds; this process ends with exit code 75." in line

    settings = settings_of(tmp_path, base, output_dir=cut / "run", **OPTIONS | LONG)
    finetune(settings, mesh=make_mesh("fsdp=8"), show=False)
    steps_here, here = zip(*losses(cut), strict=True)
    steps_whole, expected = zip(*losses(whole), strict=True)
    assert steps_here == steps_whole
    np.testing.assert_allclose(here, expected, rtol=1e-5)


def test_two_processes_write_one_run_to_a_store(base: Path, whole: Path, tmp_path: Path) -> None:
    """A run that a signal to process 1 ended is resumed from the parts that both wrote."""
    write_rows(tmp_path / "train.jsonl", 64)
    with open_store("gs") as store:
        url, sent = f"{store.url}/run", []

        def end_one(processes: Any) -> None:
            if not sent and committed_steps(f"{url}/checkpoints"):
                os.kill(processes[1].pid, signal.SIGTERM)
                sent.append(1)

        options: dict[str, Any] = {"output_dir": url, "save_steps": 2, **LONG}
        ended = run_both(base, tmp_path, tmp_path / "first", "fsdp=4", watch=end_one, **options)
        assert [one.code for one in ended] == [128 + signal.SIGTERM] * 2, ended
        ended = run_both(base, tmp_path, tmp_path / "second", "fsdp=4", **options)
        assert [one.code for one in ended] == [0, 0], ended
        parts = files_below(f"{url}/checkpoints/{LONG['max_steps']}/state")
        assert {f"ocdbt.process_{number}/manifest.ocdbt" for number in (0, 1)} <= set(parts)
        for name in ("model.safetensors", "config.json"):
            assert store.get(f"run/{name}") == (whole / "run" / name).read_bytes()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_bytes(store.get("run/log.jsonl"))
        assert losses(tmp_path) == losses(whole)
