"""The command `phi3-jax generate`."""

import sys
import time
from typing import Annotated, Any

import typer

from phi3_jax.cli import common, options
from phi3_jax.cli.interrupt import Interrupt
from phi3_jax.errors import UserError
from phi3_jax.generation import generate as generate_ids
from phi3_jax.generation import stream_tokens
from phi3_jax.parallel.distributed import from_primary
from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.pipeline import Pipeline

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; standard input if absent or -.")] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = 0,
    repetition_penalty: options.RepetitionPenalty = None,
    prompt_lookup: options.PromptLookup = None,
    num_beams: Annotated[
        int,
        typer.Option(min=1, help="Search with this many beams and print the likeliest answer at the end."),
    ] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer after this text; may be repeated.")
    ] = None,
    system: options.System = None,
    rope: options.Rope = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Answer one prompt.

    The answer goes to standard output as it is generated, statistics to standard error.
    """
    if raw and system is not None:
        raise UserError("--system needs the chat template that --raw leaves out; use one of them")
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
        raise UserError("the prompt is empty")
    paths = common.model_paths(model, adapter, cache_dir)
    pipeline = common.load_pipeline(paths, dtype, cache_dir, where, rope, quantize)
    ids = _encode(pipeline, text, system, raw)
    context = pipeline.compiled.model.config.context_length
    settings["max_new_tokens"] = max(1, min(max_new_tokens, context - len(ids)))
    settings["attention_mask"] = [[1] * len(ids)]  # no token is padding, whatever its id
    if num_beams > 1:
        _print_beams(pipeline, ids, settings)
    else:
        _print_stream(pipeline, ids, settings)


def _read_prompt() -> str:
    return from_primary(lambda: sys.stdin.read())


def _encode(pipeline: Pipeline, text: str, system: str | None, raw: bool) -> list[int]:
    if raw:
        return pipeline.tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return pipeline.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def _print_stream(pipeline: Pipeline, ids: list[int], settings: dict[str, Any]) -> None:
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
    tell(_statistics(len(ids), arrivals))
    if interrupt.stopped:
        raise typer.Exit(130)


def _print_beams(pipeline: Pipeline, ids: list[int], settings: dict[str, Any]) -> None:
    """Prints the best beam's answer, which is known only after the search."""
    begin = time.perf_counter()
    (answer,) = generate_ids(pipeline.compiled, [ids], tokenizer=pipeline.tokenizer, **settings)
    new_ids = answer[len(ids) :].tolist()
    print(pipeline.tokenizer.decode(new_ids, skip_special_tokens=True), flush=True)
    seconds = time.perf_counter() - begin
    tell(f"[{len(ids)} prompt tokens, {len(new_ids)} tokens after {seconds:.1f} s]")


def _statistics(prompt_tokens: int, arrivals: list[float]) -> str:
    """Returns a line with counts and speed.

    `arrivals` has the start and the time of each token. Speed is measured after the second token, whose step
    may compile.
    """
    count = len(arrivals) - 1
    line = f"[{prompt_tokens} prompt tokens, first new one after {arrivals[1] - arrivals[0]:.1f} s"
    line += f", {count} tokens"
    if count > 2 and (seconds := arrivals[-1] - arrivals[2]):
        line += f", {(count - 2) / seconds:.1f} tokens/s"
    return line + "]"
