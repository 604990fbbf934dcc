"""Tests the command `phi3-jax plan`: options, output, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_step import needs_libtpu, toy_step
from typer.testing import CliRunner

from phi3_jax import Phi3Config
from phi3_jax.cli import plan as command
from phi3_jax.cli.app import app
from phi3_jax.errors import UserError
from phi3_jax.plan import planning


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs the command as in `run("--model", ...)` and raises its errors."""
    monkeypatch.setattr(command, "keep_to_the_compiler", lambda: None)  # this process already has its devices
    monkeypatch.setattr(planning, "abstract_step", toy_step)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["plan", *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


MINI = ("--model", "phi-3-mini-4k-instruct")


def test_prints_a_table_and_writes_a_file(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = run(*MINI, "--topology", "h100:8", "--mesh", "fsdp=8", "--json", str(tmp_path / "plan.json"))
    assert "finetune of 16 x 4,096 tokens on h100:8, mesh fsdp=8: fits" in out
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["model"] == "phi-3-mini-4k-instruct"
    assert report["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}


def test_prints_json(run) -> None:  # type: ignore[no-untyped-def]
    arguments = (
        "--topology",
        "h200",
        "--task",
        "decode",
        "--batch",
        "4",
        "--layers",
        "2",
        "--cache-dtype",
        "int8",
    )
    report = json.loads(run(*MINI, *arguments, "--json", "-"))
    assert report["work"]["layers"] == 2
    assert report["work"]["cache_dtype"] == "int8"
    assert report["memory"]["source"] == "shapes"


def test_reads_the_config_of_a_directory(run, tmp_path: Path, small: Phi3Config) -> None:  # type: ignore[no-untyped-def]
    small.save_pretrained(tmp_path)
    out = run(
        "--model", str(tmp_path), "--topology", "h100", "--task", "prefill", "--batch", "1", "--seq", "64"
    )
    assert "prefill of 1 x 64 tokens on h100:1" in out


@needs_libtpu
def test_compiles_for_a_tpu(run) -> None:  # type: ignore[no-untyped-def]
    out = run(*MINI, "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--batch", "64", "--seq", "16")
    assert "all-gather" in out
    assert "Compiled in" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "phi-3-mini-4k", "--topology", "h100"), "did you mean 'phi-3-mini-4k-instruct'"),
        ((*MINI, "--topology", "v5e:3x3"), "v5e:4x4"),
        ((*MINI, "--topology", "h100:8", "--mesh", "fsdp=4"), "multiply to 8"),
        ((*MINI, "--topology", "h100:8", "--task", "train"), "finetune, prefill, decode"),
        ((*MINI, "--topology", "h100:8", "--lora", "8", "--task", "decode"), "finetune"),
        ((*MINI, "--topology", "h100:8", "--seq", "8192"), "context of 4096"),
    ],
)
def test_rejects_wrong_options(run, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        run(*arguments)


@needs_libtpu
@pytest.mark.slow
def test_libtpu_prints_nothing_on_standard_error() -> None:
    """In a process of its own, libtpu does not complain about an absent TPU."""
    code = (
        "from phi3_jax.plan.absent import absent_devices, keep_to_the_compiler\n"
        "from phi3_jax.plan import topology\n"
        "keep_to_the_compiler()\n"
        "print(len(absent_devices(topology('v5e:4x4'))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("16\n", "")
