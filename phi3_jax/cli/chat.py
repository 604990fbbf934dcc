"""The command `phi3-jax chat`."""

import typer

from phi3_jax.cli import common, options
from phi3_jax.cli.conversation import converse
from phi3_jax.generation.chat import ChatSession
from phi3_jax.parallel.processes import prepare

app = typer.Typer(add_completion=False)


@app.command()
def chat(
    model: options.Model = None,
    adapter: options.Adapter = None,
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
    quantize: options.Quantize = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Hold a conversation.

    Each line of the terminal or of standard input is a message; /help lists the commands.
    """
    settings = options.generation_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        prompt_lookup=prompt_lookup,
    )
    where = prepare(mesh, distributed)
    paths = common.model_paths(model, adapter, cache_dir)
    pipeline = common.load_pipeline(paths, dtype, cache_dir, where, rope, quantize)
    session = ChatSession(
        pipeline.compiled,
        pipeline.tokenizer,
        system=system,
        seed=seed,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    converse(session)
