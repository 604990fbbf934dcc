"""The house: imports run downwards, and what is installed is complete."""

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
    """A folder with the package as a wheel lays it out: `train` inside."""
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
    done = check_imports(installed)
    assert done.returncode == 0, done.stdout


def test_rejects_an_upward_import_within_a_function(installed: Path) -> None:
    room = installed / "phi3_jax" / "runs"
    files = list((ROOT / "phi3_jax" / "runs").glob("*.py"))
    room.unlink()
    room.mkdir()
    for path in files:
        (room / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with (room / "files.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef upward():\n    from phi3_jax.model import Phi3Model\n    return Phi3Model\n")
    done = check_imports(installed)
    assert done.returncode == 1
    assert "phi3_jax.runs is not allowed to import phi3_jax.model" in done.stdout


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "phi3_jax").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"phi3_jax.train"}
    assert set(settings["packages"]) == found
