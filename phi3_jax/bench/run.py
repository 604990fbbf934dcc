"""Runs `phi3-jax bench`: finds or writes the checkpoint, measures and prints a table."""

import tempfile
from pathlib import Path

from jax.sharding import Mesh

from phi3_jax.bench.batch import BatchBenchOptions, run_batch_bench
from phi3_jax.bench.generate import BenchOptions, run_generate_bench
from phi3_jax.checkpoint import resolve
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.distributed import process_count


def run_bench(
    model: str | None,
    *,
    layers: int | None,
    prompt: Path | None,
    prompt_lookup: int | None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    requests: int | None,
    rounds: int,
    dtype: str,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    peer: str | None = None,
    cache_dir: Path | None,
) -> None:
    """Measures and prints a table; the command's help explains the arguments.

    Raises:
        UserError: `layers` with a checkpoint, a preset in several processes, `requests` with a mesh or a
            prompt, or a peer that is not installed or cannot do this.
    """
    if requests is not None and (mesh is not None or prompt is not None or prompt_lookup is not None):
        raise UserError("--requests has its own prompts, on one device; leave out --mesh and --prompt")
    if peer is not None and (mesh is not None or prompt_lookup is not None):
        raise UserError("--peer is for one device without drafts; leave out --mesh and --prompt-lookup")
    if peer == "llama.cpp" and requests is not None:
        raise UserError("--peer llama.cpp continues one prompt; leave out --requests")
    if process_count() > 1 and model in Phi3Config.presets():
        raise UserError(f"{model} is a preset; for several processes give a checkpoint that all can read")
    with tempfile.TemporaryDirectory(prefix="phi3-jax-bench-") as scratch:
        path = _checkpoint(model, layers, dtype, Path(scratch) / "model", cache_dir)
        label = path.name if model is None or path.is_file() else model
        if requests is not None:
            run_batch_bench(BatchBenchOptions(path, dtype, requests, quantization), label, rounds)
            return
        axes = () if mesh is None else tuple(mesh.shape.items())
        sizes = batch, prompt_tokens, new_tokens, prompt
        options = BenchOptions(path, dtype, *sizes, mesh=axes, quantization=quantization)
        run_generate_bench(options, label, rounds, prompt_lookup, peer)


def _checkpoint(
    model: str | None, layers: int | None, dtype: str, scratch: Path, cache_dir: Path | None
) -> Path:
    """Returns the path of a checkpoint; for a preset, one with random weights is written to `scratch`."""
    if model in Phi3Config.presets():
        config = Phi3Config.preset(model)
        config = config if layers is None else config.replace(num_hidden_layers=layers)
        Phi3ForCausalLM.for_config(config)(config, dtype=dtype).save_pretrained(scratch)
        return scratch
    if layers is not None:
        raise UserError(f"--layers needs a preset; {model or 'the default model'} is a checkpoint")
    return default_model(cache_dir) if model is None else resolve(model)
