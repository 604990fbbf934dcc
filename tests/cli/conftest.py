"""Fixtures that run commands on a tiny model."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Result
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3ForCausalLM, cli
from phi3_jax.cli import common
from phi3_jax.generation import CompiledModel


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(model_folder: Path) -> CompiledModel:
    return CompiledModel(Phi3ForCausalLM.from_pretrained(model_folder))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command as in `run("generate", ...)`, in this process and through its entry point."""
    monkeypatch.setattr(common, "keep_compiled_programs", lambda cache_dir: None)

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["phi3-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def generate_command(run: Any, model_folder: Path) -> Any:
    """Runs generate on the tiny model, in float32, so that tests can compute the same answer."""

    def call(*arguments: object, stdin: str = "", model: Path = model_folder) -> Result:
        return run("generate", *arguments, "--model", model, "--dtype", "float32", stdin=stdin)

    return call
