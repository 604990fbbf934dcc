"""The command `phi3-jax quantize`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from phi3_jax.calibration import CalibrationOptions, calibrate_checkpoint
from phi3_jax.calibration.measure import TOKENS, measure_rounding
from phi3_jax.checkpoint import open_checkpoint, quantize_checkpoint, resolve
from phi3_jax.cli import options
from phi3_jax.cli.common import weight_bytes
from phi3_jax.cli.options import output_directory
from phi3_jax.evaluation.texts import first_tokens, read_text
from phi3_jax.parallel.messages import tell
from phi3_jax.quantization import Quantization
from phi3_jax.runs.progress import FileProgress
from phi3_jax.sources.hub import local_model
from phi3_jax.storage.targets import Target

app = typer.Typer(add_completion=False)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name or a URL.")],
    destination: Annotated[
        str,
        typer.Argument(
            help="The directory to write, or its URL.", parser=output_directory, metavar="destination"
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(
            help="int8, int4, or with changes: int4:group_size=32, int4:symmetric=false, int8:skip=lm_head "
            "(modules that stay floats; default: embed_tokens+lm_head), int8:activations=int8 (products "
            "round activations, too)."
        ),
    ] = "int8",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A text for which layers keep their outputs (GPTQ): 4 bits that keep more of the answers, "
            "in minutes to hours.",
            **options.INPUT,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="The most windows of the text.")] = 128,
    window_length: Annotated[int, typer.Option(min=2, help="The tokens of a window.")] = 512,
    dtype: options.Dtype = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a file, such as 5GB.")] = "5GB",
) -> None:
    """Round the weights of a checkpoint to 8 or 4 bits.

    transformers and vLLM read the result, which is in the format of compressed-tensors. The same command
    resumes an interrupted calibration.
    """
    path = resolve(source)
    if calibrate is not None:
        _calibrate(path, destination, weights, calibrate, windows, window_length, dtype, max_shard_size)
        print(f"{destination}: {_gigabytes(destination)}, from {_gigabytes(path)}")
        return
    with FileProgress(100, show=True) as progress:

        def report(done: int, total: int) -> None:
            progress.update(f"{done} of {total} tensors", 100 * done / total)

        quantize_checkpoint(path, destination, weights, max_shard_size=max_shard_size, report=report)
    print(f"{destination}: {_gigabytes(destination)}, from {_gigabytes(path)}")


def _calibrate(
    path: Path,
    destination: str,
    weights: str,
    text: Path,
    windows: int,
    length: int,
    dtype: str,
    max_shard_size: str,
) -> None:
    """Rounds with a text, and prints what that costs on the text after it."""
    quantization = Quantization.parse(weights)
    tokenizer = open_checkpoint(path).source.tokenizer()
    tokens = first_tokens(tokenizer, read_text(text), windows * length + TOKENS)
    sizes = CalibrationOptions(windows, length, dtype=dtype)
    with FileProgress(100, show=True) as progress:

        def report(done: int, total: int) -> None:
            progress.update(f"{done} of {total} layers", 100 * done / total)

        limits: dict[str, Any] = {"max_shard_size": max_shard_size, "report": report}
        calibrate_checkpoint(path, destination, tokens[: windows * length], quantization, sizes, **limits)
    rest = tokens[windows * length :]
    if len(rest) < length:
        tell(f"the text has {len(rest)} more tokens, too few to measure the perplexity of {length}")
        return
    table = Table(title=f"Perplexity of the next {len(rest):,} tokens, in windows of {length}")
    table.add_column("weights")
    table.add_column("perplexity", justify="right")
    table.add_column("change", justify="right")
    first = None
    for name, value in measure_rounding(
        path, local_model(destination), quantization, rest, dtype=dtype, length=length
    ):
        change = "" if first is None else f"{100 * (value / first - 1):+.2f} %"
        first = first or value
        table.add_row(name, f"{value:.3f}", change)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _gigabytes(target: Target) -> str:
    """Returns the size of a checkpoint's weights."""
    return f"{weight_bytes(target) / 1e9:.2f} GB"
