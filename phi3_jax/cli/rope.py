"""The group of commands `phi3-jax rope`."""

import typer

from phi3_jax.cli.lazy import lazy_group

COMMANDS = {
    "compare": "Measure the perplexity of a text by context length, under each rope.",
    "critical": "Find the pair of dims from which on a longer context needs interpolation (LongRoPE2).",
    "inspect": "Show attention by layer and head, and unseen angles, under each rope.",
    "retrieve": "Hide lines in long texts and ask for what they hold, under each rope.",
    "search": "Search rope factors for a longer context (LongRoPE).",
    "study": "Train and measure a model under each rope, and check the papers' findings.",
    "export": "Write a rope scaling for transformers, llama.cpp or vLLM.",
    "import": "Read the rope scaling of another program's file, for --rope @FILE.",
}

app = typer.Typer(cls=lazy_group(COMMANDS, "rope_"), no_args_is_help=True, add_completion=False)


@app.callback()
def rope() -> None:
    """Measure, compare, search and exchange rope scalings."""
