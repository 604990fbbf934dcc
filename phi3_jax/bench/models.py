"""Loads the models of both sides of a comparison."""

import io
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.opening import gguf_file
from phi3_jax.checkpoint.source import has_quantized_weights
from phi3_jax.generation import CompiledModel
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import chosen_quantization
from phi3_jax.native.targets import variant
from phi3_jax.quantization import FLOATS
from phi3_jax.runs.allocator import keep_freed_memory


def load_ours(
    path: Path, dtype: str, mesh: Mesh | None = None, quantization: str | None = None
) -> CompiledModel:
    """Returns this package's model, with memory settings as in the commands."""
    keep_freed_memory()
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "quantization": quantization}
    return CompiledModel(Phi3ForCausalLM.from_pretrained(path, **options))


def load_theirs(path: Path, dtype: str, *, end_tokens: bool) -> Any:
    """Returns transformers' model, on the GPU if there is one; `end_tokens`: they end an answer."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    file = path if path.is_file() else gguf_file(path)
    folder, options = (path, {}) if file is None else (file.parent, {"gguf_file": file.name})
    load = transformers.AutoModelForCausalLM.from_pretrained
    with redirect_stderr(io.StringIO()):  # a progress bar of GGUF files, which nothing else turns off
        model = load(folder, dtype=getattr(torch, dtype), **options).eval()
    if not end_tokens:
        model.generation_config.eos_token_id = None
    return model.cuda() if torch.cuda.is_available() else model


def load_llama(path: Path, tokens: int) -> Any:
    """Returns llama.cpp's model of a GGUF file, with room for so many tokens, on all processors."""
    from llama_cpp import Llama

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Llama(
        str(gguf_file(path) if path.is_dir() else path),
        n_ctx=tokens,
        n_batch=tokens,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )


def describe_weights(path: Path, dtype: str, quantization: str | None) -> str:
    """Says what our weights are, and the dtype of the rest."""
    if not _is_quantized(path, quantization):
        return dtype
    return f"{quantization or 'weights as stored'} and {dtype}"


def describe_products(path: Path, dtype: str, quantization: str | None, *, divided: bool = False) -> str:
    """Says what multiplies in this package's programs: its C++ library, with its instructions, or XLA."""
    name = variant() if (dtype == "bfloat16" or _is_quantized(path, quantization)) and not divided else None
    return f"products by {'XLA' if name is None else f'the C++ library, {name}'}"


def _is_quantized(path: Path, quantization: str | None) -> bool:
    """Whether our weights are; the quantization is that of the command's option."""
    chosen = chosen_quantization(path, quantization)
    return has_quantized_weights(open_checkpoint(path).source) if chosen is None else chosen != FLOATS
