"""The command `phi3-jax`: arguments and output; the work is done by the floors below."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from phi3_jax import cli_options as options
from phi3_jax.cli_batch import batch
from phi3_jax.cli_bench_finetune import bench_finetune
from phi3_jax.cli_classify import classify
from phi3_jax.cli_evaluate import evaluate
from phi3_jax.cli_finetune import finetune
from phi3_jax.cli_interrupt import Interrupt
from phi3_jax.cli_plan import plan
from phi3_jax.cli_processes import join, prepare, tell, tell_error
from phi3_jax.cli_rope import rope
from phi3_jax.platforms import skip_absent_tpu

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from phi3_jax.config import Phi3Config
    from phi3_jax.generation.pipeline import Pipeline

app = typer.Typer(
    name="phi3-jax",
    help="The Phi-3 family in JAX: generate, chat, fine-tune, convert, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is loaded and compiled.")
    ] = False,
) -> None:
    """The Phi-3 family in JAX: generate, chat, fine-tune, convert, measure."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; read from standard input if absent or -.")
    ] = None,
    model: options.Model = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = 0,
    repetition_penalty: options.RepetitionPenalty = None,
    prompt_lookup: options.PromptLookup = None,
    num_beams: Annotated[
        int, typer.Option(min=1, help="Follow this many answers and print the likeliest, at its end.")
    ] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End behind this text; may be repeated.")] = None,
    system: options.System = None,
    rope: options.Rope = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a template.")
    ] = False,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Answer one prompt; the answer comes on standard output as it is made, figures on standard error."""
    if raw and system is not None:
        raise ValueError("--system needs the template that --raw leaves out; use one of them")
    settings = options.generation_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        prompt_lookup=prompt_lookup,
    )
    settings |= {"seed": seed, "num_beams": num_beams}
    if stop:
        settings["stop_strings"] = stop
    where = prepare(mesh, distributed)
    text = _read_prompt() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise ValueError("the prompt is empty")
    pipeline = load_pipeline(model, dtype, cache_dir, where, rope)
    tokenizer = pipeline.tokenizer
    if raw:
        ids = tokenizer.encode(text)
    else:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    context = pipeline.compiled.model.config.context_length
    settings["max_new_tokens"] = max(1, min(max_new_tokens, context - len(ids)))
    settings["attention_mask"] = [[1] * len(ids)]  # no id means padding here
    if num_beams > 1:
        _print_best(pipeline, ids, settings)
    else:
        _print_as_made(pipeline, ids, settings)


def _read_prompt() -> str:
    from phi3_jax.distributed import from_primary

    return from_primary(lambda: sys.stdin.read())


def _print_as_made(pipeline: "Pipeline", ids: list[int], settings: dict[str, Any]) -> None:
    from phi3_jax.generation import stream_tokens

    decoder = pipeline.tokenizer.stream(skip_special_tokens=True)
    arrivals: list[float] = [time.perf_counter()]
    tokens = stream_tokens(pipeline.compiled, ids, tokenizer=pipeline.tokenizer, **settings)
    with Interrupt() as interrupt:
        for token in tokens:
            arrivals.append(time.perf_counter())
            print(decoder.put(token), end="", flush=True)
            if interrupt.stops():
                break
    print(decoder.end(), flush=True)
    tell(_figures(len(ids), arrivals))
    if interrupt.stopped:
        raise typer.Exit(130)


def _print_best(pipeline: "Pipeline", ids: list[int], settings: dict[str, Any]) -> None:
    """Of several beams: none is certain before all are done."""
    from phi3_jax.generation import generate

    begin = time.perf_counter()
    (answer,) = generate(pipeline.compiled, [ids], tokenizer=pipeline.tokenizer, **settings)
    made = answer[len(ids) :].tolist()
    print(pipeline.tokenizer.decode(made, skip_special_tokens=True), flush=True)
    seconds = time.perf_counter() - begin
    tell(f"[{len(ids)} prompt tokens, {len(made)} tokens after {seconds:.1f} s]")


def _figures(prompt_tokens: int, arrivals: list[float]) -> str:
    """Tokens per second; arrivals[0] is the start, each further one a token. The second step may compile."""
    made = len(arrivals) - 1
    line = f"[{prompt_tokens} prompt tokens, first new one after {arrivals[1] - arrivals[0]:.1f} s"
    line += f", {made} tokens"
    if made > 2 and (seconds := arrivals[-1] - arrivals[2]):
        line += f", {(made - 2) / seconds:.1f} tokens/s"
    return line + "]"


@app.command()
def chat(
    model: options.Model = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = 0,
    repetition_penalty: options.RepetitionPenalty = None,
    prompt_lookup: options.PromptLookup = None,
    rope: options.Rope = None,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Hold a conversation: a message a line, from the terminal or standard input; /help lists commands."""
    settings = options.generation_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        prompt_lookup=prompt_lookup,
    )
    pipeline = load_pipeline(model, dtype, cache_dir, prepare(mesh, distributed), rope)

    from phi3_jax.chat import ChatSession
    from phi3_jax.cli_chat import converse

    session = ChatSession(
        pipeline.compiled,
        pipeline.tokenizer,
        system=system,
        seed=seed,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    converse(session)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory, a .gguf file or a hub name.")],
    destination: Annotated[Path, typer.Argument(help="The directory to write.", file_okay=False)],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file, such as 5GB.")] = "5GB",
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes: 0 does all, the others wait.")
    ] = False,
) -> None:
    """Rewrite a checkpoint as safetensors with config and tokenizer, as transformers reads it."""
    from phi3_jax.checkpoint import convert_checkpoint, resolve
    from phi3_jax.distributed import from_primary

    def convert() -> int:
        convert_checkpoint(resolve(source), destination, dtype=dtype, max_shard_size=max_shard_size)
        return sum(path.stat().st_size for path in destination.glob("*.safetensors"))

    join(distributed)
    print(f"{destination}: {from_primary(convert) / 1e9:.2f} GB")


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(help="A directory, or a preset's name for random weights; default: the default model."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of a preset: this many layers only.")] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="A text file to answer; default: random tokens.", dir_okay=False)
    ] = None,
    prompt_lookup: Annotated[
        int | None, typer.Option(min=1, help="Compare drafts of so many tokens from the text with none.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the random prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens after the first.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: so many prompts of all lengths, as batch answers them."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements, ours and theirs in turn.")] = 5,
    dtype: options.Dtype = "bfloat16",
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure generate, side by side with transformers where it is installed and no mesh is given."""
    from phi3_jax.bench import run_bench

    where = prepare(mesh, distributed)
    keep_compiled_programs(cache_dir)
    run_bench(
        model,
        layers=layers,
        prompt=prompt,
        prompt_lookup=prompt_lookup,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        requests=requests,
        rounds=rounds,
        dtype=dtype,
        mesh=where,
        cache_dir=cache_dir,
    )


app.command()(batch)
app.command()(plan)
app.command()(finetune)
app.command()(classify)
app.command()(bench_finetune)
app.command()(evaluate)
app.add_typer(rope)


def load_pipeline(
    model: str | None,
    dtype: str,
    cache_dir: Path | None,
    mesh: "Mesh | None" = None,
    rope: str | None = None,
) -> "Pipeline":
    """The checkpoint that `--model` names, ready to answer; of several processes all have it, or none.

    `rope`: in place of its own, as `parse_rope` takes it.
    """
    from phi3_jax.distributed import together
    from phi3_jax.generation.pipeline import Pipeline

    keep_compiled_programs(cache_dir)

    def load() -> Pipeline:
        path = model_path(model, cache_dir)
        config = None if rope is None else config_with(path, rope)
        return Pipeline.load(path, dtype=dtype, mesh=mesh, config=config)

    return together(load)


def config_with(path: Path, rope: str) -> "Phi3Config":
    """A checkpoint's config with the rope that `--rope` names."""
    from phi3_jax.checkpoint import open_checkpoint
    from phi3_jax.rope_argument import parse_rope

    argument = parse_rope(rope)
    return argument.written(open_checkpoint(path)[1])


def model_path(model: str | None, cache_dir: Path | None) -> Path:
    """Where the checkpoint lies that `--model` names, fetched if need be."""
    from phi3_jax.checkpoint import default_model, resolve

    return default_model(cache_dir, progress=tell) if model is None else resolve(model)


def keep_compiled_programs(cache_dir: Path | None) -> None:
    """Keeps compiled programs between runs, unless the user has told JAX where, or not to."""
    import jax

    from phi3_jax.checkpoint.default_model import cache_folder

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # set at run time
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(cache_dir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main() -> NoReturn:
    """Runs the command; what the user can mend is one line on standard error, not a traceback."""
    skip_absent_tpu()
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError, TypeError) as error:
        tell_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
