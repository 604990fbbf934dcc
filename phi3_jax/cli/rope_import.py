"""The command `phi3-jax rope import`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from phi3_jax.cli import options
from phi3_jax.parallel.messages import tell
from phi3_jax.rope_lab.interchange.json_text import json_text
from phi3_jax.rope_lab.interchange.reading import read_rope, summary
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.outputs import write_text

app = typer.Typer(add_completion=False)


@app.command(name="import")
def import_rope(
    file: Annotated[
        Path,
        Argument(
            help="A config.json, a .gguf file, overrides for vLLM, or a rope entry; also a URL.",
            **options.INPUT,
        ),
    ],
    output: Annotated[
        Path | None,
        Option(help="The file to write, or its URL; default: standard output.", **options.OUTPUT),
    ] = None,
) -> None:
    """Read the rope scaling of another program's file, for --rope @FILE.

    It prints the type, the lengths and the attention factor.
    """
    check_outputs({"--output": output}, {"FILE": file})
    rope = read_rope(file)
    text = json_text(rope)
    if output is None:
        print(text)
        tell(summary(rope))
        return
    write_text(output, text + "\n")
    print(f"{output}: {summary(rope)}")
