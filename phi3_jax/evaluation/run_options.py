"""Options of a measurement that its results depend on, and that a run file keeps."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint.fingerprint import fingerprint


def model_options(model: Path, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Returns what identifies a model and its computations, for JSON."""
    return {
        "model": str(model.resolve()),
        "model_files": fingerprint(model),
        "dtype": str(dtype),
        "mesh": None if mesh is None else dict(mesh.shape),
    }
