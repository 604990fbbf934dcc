"""The command `phi3-jax`: arguments and output; the work is done by the floors below."""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="phi3-jax",
    help="The Phi-3 family in JAX: generate, convert, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A directory, a .gguf file or a hub name; default: SmolLM2-135M-Instruct, fetched once."
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        envvar="PHI3_JAX_CACHE",
        help="Where the default model and compiled programs are kept.",
        file_okay=False,
    ),
]


@app.callback()
def common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is loaded and compiled.")
    ] = False,
) -> None:
    """The Phi-3 family in JAX: generate, convert, measure."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; read from standard input if absent or -.")
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a template.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "bfloat16",
    cache_dir: CacheOption = None,
) -> None:
    """Answer one prompt; the answer comes on standard output as it is made, figures on standard error."""
    from phi3_jax.checkpoint import default_model, resolve
    from phi3_jax.generation import Sampling, stream_tokens
    from phi3_jax.generation.pipeline import Pipeline

    if raw and system is not None:
        raise ValueError("--system needs the template that --raw leaves out; use one of them")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise ValueError("the prompt is empty")
    keep_compiled_programs(cache_dir)
    path = default_model(cache_dir) if model is None else resolve(model)
    pipeline = Pipeline.load(path, dtype=dtype)
    tokenizer = pipeline.tokenizer
    if raw:
        ids = tokenizer.encode(text)
    else:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    decoder = tokenizer.stream(skip_special_tokens=True)
    sampling = Sampling(temperature, top_k, top_p)
    arrivals: list[float] = [time.perf_counter()]
    interrupted = False
    try:
        for token in stream_tokens(
            pipeline.compiled,
            ids,
            max_new_tokens=max_new_tokens,
            end_tokens=pipeline.end_tokens,
            sampling=sampling,
            seed=seed,
        ):
            arrivals.append(time.perf_counter())
            print(decoder.put(token), end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(decoder.end(), flush=True)
    print(_figures(len(ids), arrivals), file=sys.stderr)
    if interrupted:
        raise typer.Exit(130)


def _figures(prompt_tokens: int, arrivals: list[float]) -> str:
    """Tokens per second; arrivals[0] is the start, each further one a token. The second step may compile."""
    made = len(arrivals) - 1
    if made == 0:
        return f"[{prompt_tokens} prompt tokens, interrupted before the first new one]"
    line = f"[{prompt_tokens} prompt tokens, first new one after {arrivals[1] - arrivals[0]:.1f} s"
    if made > 2:
        line += f", {made} tokens, {(made - 2) / (arrivals[-1] - arrivals[2]):.1f} tokens/s"
    return line + "]"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory, a .gguf file or a hub name.")],
    destination: Annotated[Path, typer.Argument(help="The directory to write.", file_okay=False)],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file, such as 5GB.")] = "5GB",
) -> None:
    """Rewrite a checkpoint as safetensors with config and tokenizer, as transformers reads it."""
    from phi3_jax.checkpoint import convert_checkpoint, resolve

    convert_checkpoint(resolve(source), destination, dtype=dtype, max_shard_size=max_shard_size)
    size = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
    print(f"{destination}: {size / 1e9:.2f} GB")


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(help="A directory, or a preset's name for random weights; default: the default model."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of a preset: this many layers only.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Decode steps in a measurement.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements, ours and theirs in turn.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "bfloat16",
    cache_dir: CacheOption = None,
) -> None:
    """Measure prefill and decode, side by side with transformers where it is installed."""
    from phi3_jax.bench import run_bench

    keep_compiled_programs(cache_dir)
    run_bench(
        model,
        layers=layers,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        rounds=rounds,
        dtype=dtype,
        cache_dir=cache_dir,
    )


def keep_compiled_programs(cache_dir: Path | None) -> None:
    """Keeps compiled programs between runs, unless the user has told JAX where, or not to."""
    import jax

    from phi3_jax.checkpoint.default_model import cache_folder

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # set at run time
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(cache_dir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main() -> NoReturn:
    """Runs the command; what the user can mend is one line on standard error, not a traceback."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError, TypeError) as error:
        print(f"phi3-jax: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
