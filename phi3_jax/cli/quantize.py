"""The command `phi3-jax quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from phi3_jax.checkpoint import quantize_checkpoint, resolve
from phi3_jax.cli.options import directory
from phi3_jax.runs.progress import FileProgress

app = typer.Typer(add_completion=False)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A directory, a .gguf file or a hub name.")],
    destination: Annotated[
        Path, typer.Argument(help="The directory to write.", parser=directory, metavar="destination")
    ],
    weights: Annotated[
        str,
        typer.Option(
            help="int8, int4, or with changes: int4:group_size=32, int4:symmetric=false, int8:skip=lm_head "
            "(modules that stay floats; default: embed_tokens+lm_head)."
        ),
    ] = "int8",
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a file, such as 5GB.")] = "5GB",
) -> None:
    """Round the weights of a checkpoint to 8 or 4 bits.

    transformers and vLLM read the result, which is in the format of compressed-tensors.
    """
    path = resolve(source)
    with FileProgress(100, show=True) as progress:

        def report(done: int, total: int) -> None:
            progress.update(f"{done} of {total} tensors", 100 * done / total)

        quantize_checkpoint(path, destination, weights, max_shard_size=max_shard_size, report=report)
    print(f"{destination}: {_gigabytes(destination)}, from {_gigabytes(path)}")


def _gigabytes(path: Path) -> str:
    """Returns the size of a checkpoint's weights."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB"
