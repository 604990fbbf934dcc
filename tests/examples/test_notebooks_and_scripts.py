"""Runs the scripts and notebooks of `examples/`, and compares what they print with what they show."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest

from phi3_jax import CheckpointError
from phi3_jax.checkpoint.default_model import default_model

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
LARGEST = 300_000
"""The most bytes of a notebook."""


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test if there is no default model; processes that the test starts look for no accelerator."""
    try:
        default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is not available: {error}")
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))


def code_cells(name: str) -> list[dict[str, Any]]:
    cells = json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.live
@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    import notebooks

    stored, run = notebooks.read(FOLDER / name), notebooks.run(FOLDER / name, tmp_path)
    for before, after in zip(stored.cells, run.cells, strict=True):
        if before.cell_type == "code":
            pages.compare(pages.printed(before), pages.printed(after))
            figures = [
                [output.output_type for output in cell.outputs if output.output_type != "stream"]
                for cell in (before, after)
            ]
            assert figures[0] == figures[1]


def shown(name: str) -> tuple[dict[str, str], list[str], str]:
    """Returns the command that a script's docstring shows, its variables and arguments, and its output."""
    docstring = ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8"))) or ""
    _, command, output = re.split(r"^\$ (.*)\n", docstring, flags=re.MULTILINE)
    words = shlex.split(command)
    python = words.index("python")
    return dict(word.split("=", 1) for word in words[:python]), words[python + 1 :], output


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_prints_what_its_docstring_shows(name: str) -> None:
    variables, arguments, output = shown(name)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parent,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages.compare(output, done.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstring_shows_command_and_output(name: str) -> None:
    _, arguments, output = shown(name)
    assert arguments[0] == f"examples/{name}"
    assert output.strip()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_valid(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(FOLDER / name, as_version=4))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_was_run_from_top_to_bottom(name: str) -> None:
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    for cell in cells:
        code = "".join(cell["source"])
        printing = re.search(r"^ {0,8}print\(", code, re.MULTILINE)
        assert bool(cell["outputs"]) == bool(printing or "plt.subplots" in code), code


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_stores_nothing_of_the_machine_or_the_time(name: str) -> None:
    content = (FOLDER / name).read_text(encoding="utf-8")
    assert len(content) <= LARGEST
    notebook = json.loads(content)
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    texts = [
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in code_cells(name)
        for output in cell["outputs"]
    ]
    assert not re.search(r"(?:^|[\s'\"(])(?:/\w+){2,}|[A-Z]:\\", "\n".join(texts), re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_begins_with_its_installation(name: str) -> None:
    first = "".join(code_cells(name)[0]["source"])
    assert 'find_spec("phi3_jax") is None' in first
    assert "%pip install" in first


def test_table_lists_every_example() -> None:
    listed = re.findall(r"^\| \[`([^`]+)`\]\(\1\) ", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*NOTEBOOKS, *SCRIPTS])
