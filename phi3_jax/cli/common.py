"""Finds and loads the model of a command, and keeps compiled programs."""

from pathlib import Path

from jax.sharding import Mesh

from phi3_jax.checkpoint import open_checkpoint, resolve
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.parallel.distributed import run_everywhere
from phi3_jax.parallel.messages import tell
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.cache_folder import keep_compiled_programs


def load_pipeline(
    model: str | None,
    dtype: str,
    cache_dir: Path | None,
    mesh: Mesh | None = None,
    rope: str | None = None,
) -> Pipeline:
    """Loads the checkpoint that `--model` names, with the rope that `--rope` names if there is one.

    An error in one process is raised in all of them.
    """
    keep_compiled_programs(cache_dir)

    def load() -> Pipeline:
        checkpoint = open_checkpoint(model_path(model, cache_dir))
        config = None if rope is None else parse_rope(rope).config_to_save(checkpoint.config)
        return Pipeline.load(checkpoint, dtype=dtype, mesh=mesh, config=config)

    return run_everywhere(load)


def config_with(path: Path, rope: str) -> Phi3Config:
    """Returns a checkpoint's config with the rope that `--rope` names."""
    return parse_rope(rope).config_to_save(open_checkpoint(path).config)


def model_path(model: str | None, cache_dir: Path | None) -> Path:
    """Returns the path of the checkpoint that `--model` names, after fetching it if necessary."""
    return default_model(cache_dir, progress=tell) if model is None else resolve(model)
