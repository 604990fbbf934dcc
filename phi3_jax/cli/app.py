"""The command `phi3-jax` and the list of its sub-commands."""

from typing import Annotated

import typer

from phi3_jax.cli.lazy import lazy_group
from phi3_jax.parallel.messages import show_log

COMMANDS = {
    "generate": "Answer one prompt.",
    "chat": "Hold a conversation.",
    "batch": "Answer files of requests.",
    "convert": "Rewrite a checkpoint as safetensors with config and tokenizer.",
    "quantize": "Round the weights of a checkpoint to 8 or 4 bits.",
    "finetune": "Train a classifier, a tagger or a language model.",
    "classify": "Label the rows of a file with a fine-tuned model.",
    "evaluate": "Measure the perplexity and the bits per byte of a text.",
    "rope": "Measure, compare, search and exchange rope scalings.",
    "plan": "Compile a step for absent TPUs: does it fit, what moves, how fast at most?",
    "bench": "Measure generate, side by side with transformers or llama.cpp.",
    "bench-finetune": "Measure training steps, side by side with transformers.",
    "bench-input": "Measure how fast the host reads, tokenises, batches and writes rows, without a model.",
}
"""Each command's line in `phi3-jax --help`, which is the first sentence of its own help.

A command is `app` in the module of its name."""

app = typer.Typer(
    name="phi3-jax",
    cls=lazy_group(COMMANDS),
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
    show_log(verbose)
