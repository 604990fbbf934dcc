"""The group of commands `phi3-jax rope`."""

import typer

from phi3_jax.cli.lazy import lazy_group

COMMANDS = {
    "compare": "Measure the perplexity of a text by context length, under each rope.",
    "inspect": "Show attention by layer and head, and unseen angles, under each rope.",
    "passkey": "Hide a number in long texts and ask for it, under each rope.",
    "search": "Search rope factors for a longer context (LongRoPE).",
}

app = typer.Typer(cls=lazy_group(COMMANDS, "rope_"), no_args_is_help=True, add_completion=False)


@app.callback()
def rope() -> None:
    """Measure, compare and search rope scalings."""
