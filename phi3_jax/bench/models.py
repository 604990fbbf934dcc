"""Loads the models of both sides of a comparison."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.generation import CompiledModel
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.native.targets import variant
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
    is_gguf = path.is_file()
    folder, options = (path.parent, {"gguf_file": path.name}) if is_gguf else (path, {})
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype), **options).eval()
    if not end_tokens:
        model.generation_config.eos_token_id = None
    return model.cuda() if torch.cuda.is_available() else model


def load_llama(path: Path, tokens: int) -> Any:
    """Returns llama.cpp's model of a GGUF file, with room for so many tokens, on all processors."""
    from llama_cpp import Llama

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Llama(
        str(path), n_ctx=tokens, n_batch=tokens, n_threads=threads, n_threads_batch=threads, verbose=False
    )


def describe_products(dtype: str, *, divided: bool = False, quantization: str | None = None) -> str:
    """Says what multiplies in this package's programs: its C++ library, with its instructions, or XLA."""
    name = variant() if (dtype == "bfloat16" or quantization is not None) and not divided else None
    return f"products by {'XLA' if name is None else f'the C++ library, {name}'}"
