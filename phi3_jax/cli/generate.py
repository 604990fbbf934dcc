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

app = typer.Typer()


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
        raise UserError("--system needs the template that --raw leaves out; use one of them")
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
    pipeline = common.load_pipeline(model, dtype, cache_dir, where, rope)
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

    return from_primary(lambda: sys.stdin.read())


def _print_as_made(pipeline: Pipeline, ids: list[int], settings: dict[str, Any]) -> None:

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


def _print_best(pipeline: Pipeline, ids: list[int], settings: dict[str, Any]) -> None:
    """Of several beams: none is certain before all are done."""

    begin = time.perf_counter()
    (answer,) = generate_ids(pipeline.compiled, [ids], tokenizer=pipeline.tokenizer, **settings)
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
