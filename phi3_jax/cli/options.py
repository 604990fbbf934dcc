"""Options that several commands share, and the arguments of `generate` that they stand for."""

import os
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Context, Option

from phi3_jax.errors import UserError
from phi3_jax.runs.cache_folder import CACHE_VARIABLE
from phi3_jax.storage.fetch import fetch
from phi3_jax.storage.urls import is_url


def _set_cache_dir(context: Context, directory: Path | None) -> Path | None:
    """Makes the directory that of everything that the command does, also of the options after it."""
    if directory is not None:
        before = os.environ.get(CACHE_VARIABLE)

        def restore() -> None:
            if before is None:
                os.environ.pop(CACHE_VARIABLE, None)
            else:
                os.environ[CACHE_VARIABLE] = before

        os.environ[CACHE_VARIABLE] = str(directory)
        context.call_on_close(restore)
    return directory


Model = Annotated[
    str | None,
    Option(
        help="A directory, a .gguf file, a hub name or a URL (gs://, s3://); default: SmolLM2-135M-Instruct, "
        "fetched once."
    ),
]
Adapter = Annotated[
    str | None,
    Option(
        help="LoRA adapters in PEFT's format: a directory, such as the adapter/ of a run of finetune, or a "
        "hub name. Without --model, the base model is the one that they name."
    ),
]
CacheDir = Annotated[
    Path | None,
    Option(
        envvar=CACHE_VARIABLE,
        help="A directory for the default model, compiled programs and copies of remote files.",
        file_okay=False,
        is_eager=True,
        callback=_set_cache_dir,
    ),
]
Mesh = Annotated[
    str | None,
    Option(
        help="Divide the model over all devices, as in fsdp=4,tensor=2: sizes of data, fsdp, context and "
        "tensor whose product is the number of devices; -1: all that are left. Default: one device."
    ),
]
Distributed = Annotated[
    bool,
    Option(
        "--distributed",
        help="Run as one of several processes with the same command, on Cloud TPU, GKE, SLURM, Open MPI, or "
        "with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID set. Process 0 prints and writes.",
    ),
]
Dtype = Annotated[str, Option(help="The dtype of parameters and activations.")]
Quantize = Annotated[
    str | None,
    Option(
        help="Round the projections' weights as they are loaded: int8, int4, int4:group_size=32, "
        "int8:activations=int8 (also what they multiply), or none for floats; default: as the checkpoint has "
        "them."
    ),
]
Ropes = Annotated[
    list[str] | None,
    Option(
        help="A rope scaling; may be repeated: none, linear:factor=4, dynamic:factor=4, yarn:factor=4, "
        "longrope:@factors.json, @rope.json (an entry of a config.json), ntk.py:ntk:factor=4 (your own)."
    ),
]
Rope = Annotated[
    str | None,
    Option(
        help="A rope scaling instead of the model's: none, linear:factor=4, dynamic:factor=4, yarn:factor=4, "
        "longrope:@factors.json, @rope.json (an entry of a config.json), ntk.py:ntk:factor=4 (your own)."
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Start over if the output cannot be resumed.")]
System = Annotated[str | None, Option(help="A system message at the start of the conversation.")]
MaxNewTokens = Annotated[int, Option(min=1, help="End an answer after this many tokens.")]
Temperature = Annotated[
    float, Option(min=0.0, help="The temperature of random draws; 0: always the likeliest token.")
]
TopK = Annotated[int | None, Option(min=0, help="Draw from this many likeliest tokens; default: all.")]
TopP = Annotated[
    float | None, Option(help="Draw from the likeliest tokens of this total probability; default: all.")
]
MinP = Annotated[
    float | None, Option(help="Draw from tokens at least this likely, relative to the likeliest one.")
]
Seed = Annotated[int, Option(help="The seed of the random draws.")]
RepetitionPenalty = Annotated[
    float | None, Option(help="Above 1: tokens that occurred become less likely; default: the checkpoint's.")
]
PromptLookup = Annotated[
    int | None, Option(min=1, help="Draft this many tokens from earlier text; the answer stays the same.")
]


def input_file(text: str) -> Path:
    """Parses the name of a file to read; that of a URL is fetched."""
    try:
        path = fetch(text)
    except (UserError, FileNotFoundError) as error:
        raise BadParameter(str(error)) from error
    if path.is_dir():
        raise BadParameter(f"File {text!r} is a directory.")
    return path


INPUT: dict[str, Any] = {"parser": input_file, "metavar": "FILE"}
"""What options of files to read have in common."""


def output_file(text: str) -> Path | str:
    """Parses the name or the URL of a file to write."""
    if is_url(text):
        return text
    path = Path(text)
    if path.is_dir():
        raise BadParameter(f"File {text!r} is a directory.")
    return path


OUTPUT: dict[str, Any] = {"parser": output_file, "metavar": "FILE"}
"""What options of files to write have in common."""


def output_directory(text: str) -> Path | str:
    """Parses the name or the URL of a directory to write."""
    return text if is_url(text) else directory(text)


def directory(text: str) -> Path:
    """Parses the name of a directory to write.

    An empty name, as of a variable that is not set, would be the current directory.
    """
    if not text:
        raise BadParameter("the name is empty; write . for the current directory")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise BadParameter(f"{text!r} is a file; name a directory")
    return path


def numbers(name: str, text: str, *, least: int) -> list[int]:
    """Parses whole numbers of int32 that are separated by commas.

    Raises:
        UserError: a part is not such a number, or is below `least`.
    """
    values = []
    for part in text.split(","):
        try:
            values.append(int(part))
        except ValueError:
            raise UserError(f"--{name} {text}: {part!r} is not a whole number") from None
        if values[-1] < least:
            raise UserError(f"--{name} {text}: {part} must be at least {least}")
        if values[-1] >= 2**31:
            raise UserError(f"--{name} {text:.40}: {part.strip():.20} must be below 2**31")
    return values


def generation_options(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    prompt_lookup: int | None,
) -> dict[str, Any]:
    """Returns the arguments of `generate` that these options stand for.

    They decide alone how tokens are drawn, whatever the checkpoint's generation_config.json has.
    """
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    if prompt_lookup is not None:
        options["prompt_lookup_num_tokens"] = prompt_lookup
    narrowed = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if temperature > 0:
        all_tokens = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        given = {name: value for name, value in narrowed.items() if value is not None}
        return options | {"temperature": temperature} | all_tokens | given
    for name, value in narrowed.items():
        if value is not None:
            raise UserError(
                f"--{name.replace('_', '-')} {value} does nothing without draws; add --temperature 0.7"
            )
    return options
