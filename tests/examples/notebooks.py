"""Runs the example notebooks as a reader does, from top to bottom in a fresh kernel.

As a command, this file runs notebooks and stores their outputs:
`python tests/examples/notebooks.py examples/*.ipynb`.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def read(path: Path) -> Any:
    """Returns a notebook, which must be valid."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(path: Path, folder: Path) -> Any:
    """Returns a copy of the notebook with new outputs; its kernel runs in `folder`.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = read(path)
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    inline = "module://matplotlib_inline.backend_inline"
    client.execute(env=os.environ | {"PYTHONUNBUFFERED": "1", "MPLBACKEND": inline})
    return notebook


def remake(path: Path) -> None:
    """Stores new outputs, without warnings and progress, and without what differs from run to run."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(path, Path(folder))
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        remake(Path(argument))
