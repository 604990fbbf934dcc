"""Options of a measurement that its results depend on, and that a run file keeps."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.errors import UserError
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.fetch import display_name
from phi3_jax.storage.targets import Target, local_target, target_in

STATE = "state.json"
"""The file of results so far, by which a run resumes."""


def check_output(output: Target, names: Iterable[str], *, model: Path, text: Path | None) -> None:
    """Checks that a measurement would not write over its model or its text, before it begins.

    Args:
        output: the directory to write, or its URL.
        names: the files and directories to write in it.

    Raises:
        UserError: one of the directories is the model's, or one of the files is read.
    """
    targets = {name: target_in(output, name) for name in names}
    for target in (output, *targets.values()):
        if _is_same(target, model):
            raise UserError(f"--output {output} would write over the model {target}; choose another --output")
    files = {f"--output's {name}": each for name, each in targets.items() if not Path(each).is_dir()}
    check_outputs(files, {"--text": text, "--model": model})


def _is_same(target: Target, model: Path) -> bool:
    """Whether a directory to write is that of a model, which may be a copy."""
    path = local_target(target)
    if path is None:
        return os.fspath(target).rstrip("/") == display_name(model)
    return path.is_dir() and model.exists() and path.samefile(model)


def model_options(model: Path, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Returns what identifies a model and its computations, for JSON."""
    return {
        "model": display_name(model),
        "model_files": fingerprint(model),
        "dtype": str(dtype),
        "mesh": None if mesh is None else dict(mesh.shape),
    }
