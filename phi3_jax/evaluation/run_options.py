"""Options of a measurement that its results depend on, and that a run file keeps."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.errors import UserError
from phi3_jax.runs.files import check_outputs
from phi3_jax.storage.fetch import display_name

STATE = "state.json"
"""The file of results so far, by which a run resumes."""


def check_output(output: Path, names: Iterable[str], *, model: Path, text: Path | None) -> None:
    """Checks that a measurement would not write over its model or its text, before it begins.

    Args:
        output: the directory to write.
        names: the files and directories to write in it.

    Raises:
        UserError: one of the directories is the model's, or one of the files is read.
    """
    paths = {name: output / name for name in names}
    for path in (output, *paths.values()):
        if path.is_dir() and model.exists() and path.samefile(model):
            raise UserError(f"--output {output} would write over the model {path}; choose another --output")
    files = {f"--output's {name}": path for name, path in paths.items() if not path.is_dir()}
    check_outputs(files, {"--text": text, "--model": model})


def model_options(model: Path, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Returns what identifies a model and its computations, for JSON."""
    return {
        "model": display_name(model),
        "model_files": fingerprint(model),
        "dtype": str(dtype),
        "mesh": None if mesh is None else dict(mesh.shape),
    }
