"""The command `phi3-jax rope export`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from phi3_jax.checkpoint.default_model import MODEL_ID, default_model
from phi3_jax.cli import options
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.errors import UserError
from phi3_jax.parallel.messages import tell
from phi3_jax.rope_lab.interchange.gguf import gguf_rope, write_gguf_rope
from phi3_jax.rope_lab.interchange.json_text import json_text
from phi3_jax.rope_lab.interchange.source import open_config
from phi3_jax.rope_lab.interchange.transformers import transformers_fields
from phi3_jax.rope_lab.interchange.vllm import hf_overrides, serve_command
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, suffix_of

app = typer.Typer(add_completion=False)


@app.command()
def export(
    format: Annotated[
        Literal["transformers", "gguf", "vllm"],
        Option(help="transformers (fields of a config.json), gguf (for llama.cpp) or vllm (overrides)."),
    ],
    output: Annotated[
        Path | None,
        Option(help="The file to write, or its URL; default: standard output for JSON.", **options.OUTPUT),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="A directory, a config.json, a .gguf file, a hub name or a URL, of which only the config is "
            "read; default: the model of --gguf, else SmolLM2-135M-Instruct."
        ),
    ] = None,
    rope: options.Rope = None,
    model_type: Annotated[
        Literal["phi3", "llama"] | None,
        Option(
            help="The architecture by which the other program knows the model; default: the one that the "
            "model's files name."
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        Option(help="A .gguf file to copy with this rope; without it, the rope alone.", **options.INPUT),
    ] = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Write a rope scaling for transformers, llama.cpp or vLLM.

    Without --rope it is the model's own. What the other program cannot express is an error.
    """
    _check_options(format, output, gguf)
    source = model or gguf or default_model(cache_dir, progress=tell)
    opened = open_config(source)
    check_outputs({"--output": output}, {"--gguf": gguf, "--model": opened.file})
    config = opened.config if rope is None else parse_rope(rope).config_to_save(opened.config)
    kind = model_type or (opened if gguf is None else open_config(gguf)).model_type
    if format == "gguf":
        _write_gguf(output, config, kind, gguf)
        return
    content = transformers_fields(config, kind) if format == "transformers" else hf_overrides(config, kind)
    _write_json(output, content)
    entry = content.get("rope_scaling") or {}
    if kind == "phi3" and "attention_factor" in entry:
        tell("transformers 4 refuses the attention_factor of a Phi-3; transformers 5 reads it")
    if format == "vllm":
        tell(serve_command(model or MODEL_ID, content, config.context_length))
        if (last := config.rope_scaling.switches_at(config.rope_base)) is not None:
            tell(
                f"vLLM uses the long list for all texts; for the short one, serve with --max-model-len {last}"
            )


def _check_options(format: str, output: Target | None, gguf: Path | None) -> None:
    if format != "gguf":
        if gguf is not None:
            raise UserError(f"--gguf does nothing with --format {format}; name the model with --model")
        return
    if output is None or suffix_of(output) != ".gguf":
        raise UserError("--format gguf needs --output FILE.gguf")


def _write_json(output: Target | None, content: dict[str, Any]) -> None:
    text = json_text(content)
    if output is None:
        print(text)
        return
    write_text(output, text + "\n")
    print(output)


def _write_gguf(output: Target | None, config: Phi3Config, architecture: str, model: Path | None) -> None:
    assert output is not None
    written = gguf_rope(config, architecture)
    write_gguf_rope(output, written, model, show=True)
    names = ", ".join(written.tensors) or "no tensors"
    print(f"{output}: {'the model with ' if model else ''}rope of {architecture}, {names}")
    if written.has_two_lists:
        last = config.original_max_position_embeddings
        tell(f"llama.cpp uses the long list for all texts if its context (-c) is above {last:,} tokens")
