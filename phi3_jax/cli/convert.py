"""The command `phi3-jax convert`."""

from typing import Annotated

import typer

from phi3_jax.checkpoint import convert_checkpoint, resolve
from phi3_jax.cli.common import weight_bytes
from phi3_jax.cli.options import output_directory
from phi3_jax.parallel.distributed import from_primary
from phi3_jax.parallel.processes import join

app = typer.Typer(add_completion=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name or a URL.")],
    destination: Annotated[
        str,
        typer.Argument(
            help="The directory to write, or its URL.", parser=output_directory, metavar="destination"
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a file, such as 5GB.")] = "5GB",
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="Run as one of several processes; process 0 works and the others wait."
        ),
    ] = False,
) -> None:
    """Rewrite a checkpoint as safetensors with config and tokenizer.

    transformers reads the result.
    """

    def write() -> int:
        convert_checkpoint(resolve(source), destination, dtype=dtype, max_shard_size=max_shard_size)
        return weight_bytes(destination)

    join(distributed)
    print(f"{destination}: {from_primary(write) / 1e9:.2f} GB")
