"""The folder where this package keeps what it makes: the default model and compiled programs."""

import os
from pathlib import Path

CACHE_VARIABLE = "PHI3_JAX_CACHE"


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder: the argument, else PHI3_JAX_CACHE, else the user's cache."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    if not chosen:
        import platformdirs  # a model in float32 runs without it

        chosen = platformdirs.user_cache_dir("phi3-jax")
    return Path(chosen).expanduser().absolute()


def keep_compiled_programs(cache_dir: str | os.PathLike[str] | None) -> None:
    """Keeps compiled programs between runs, unless the user has set JAX's own cache directory."""
    import jax  # tokenizers and files need no JAX

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # set at run time
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(cache_dir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
