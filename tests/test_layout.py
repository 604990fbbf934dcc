"""Imports run downwards, and the installed package is complete."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Returns a folder with the package as a wheel arranges it, with `train` inside."""
    package = tmp_path / "phi3_jax"
    package.mkdir()
    for path in [*(ROOT / "phi3_jax").iterdir(), ROOT / "train"]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return tmp_path


def check_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHECK, "--no-cache", str(ROOT / "pyproject.toml")],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_imports_run_downwards(installed: Path) -> None:
    result = check_imports(installed)
    assert result.returncode == 0, result.stdout


def test_rejects_an_upward_import_within_a_function(installed: Path) -> None:
    package = installed / "phi3_jax" / "runs"
    files = list((ROOT / "phi3_jax" / "runs").glob("*.py"))
    package.unlink()
    package.mkdir()
    for path in files:
        (package / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with (package / "files.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef upward():\n    from phi3_jax.model import Phi3Model\n    return Phi3Model\n")
    result = check_imports(installed)
    assert result.returncode == 1
    assert "phi3_jax.runs is not allowed to import phi3_jax.model" in result.stdout


def test_installs_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "phi3_jax").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"phi3_jax.train"}
    assert set(settings["packages"]) == packages
