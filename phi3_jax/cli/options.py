"""Options that several commands share, and what they mean to generate."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from phi3_jax.errors import UserError

Model = Annotated[
    str | None,
    Option(help="A directory, a .gguf file or a hub name; default: SmolLM2-135M-Instruct, fetched once."),
]
CacheDir = Annotated[
    Path | None,
    Option(
        envvar="PHI3_JAX_CACHE",
        help="Where the default model and compiled programs are kept.",
        file_okay=False,
    ),
]
Mesh = Annotated[
    str | None,
    Option(
        help="Divide the model over all devices: sizes of data, fsdp, context, tensor that multiply to their "
        "number, as in fsdp=4,tensor=2; -1: what is left. Default: one device, however many there are."
    ),
]
Distributed = Annotated[
    bool,
    Option(
        "--distributed",
        help="This is one of several processes with the same command, on Cloud TPU, GKE, SLURM, Open MPI, or "
        "with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID set. Process 0 prints and writes.",
    ),
]
Dtype = Annotated[str, Option(help="Of parameters and activations.")]
Ropes = Annotated[
    list[str] | None,
    Option(
        help="A scaling, may be repeated: none, linear:factor=4, dynamic:factor=4, yarn:factor=4, "
        "longrope:@factors.json, @rope.json (an entry of a config.json), ntk.py:ntk:factor=4 (your own)."
    ),
]
Rope = Annotated[
    str | None,
    Option(
        help="In place of the model's: none, linear:factor=4, dynamic:factor=4, yarn:factor=4, "
        "longrope:@factors.json, @rope.json (an entry of a config.json), ntk.py:ntk:factor=4 (your own)."
    ),
]
System = Annotated[str | None, Option(help="A system message before everything else.")]
MaxNewTokens = Annotated[int, Option(min=1, help="End an answer after this many tokens.")]
Temperature = Annotated[float, Option(min=0.0, help="0: always the most likely token.")]
TopK = Annotated[int | None, Option(min=0, help="Draw from this many tokens; default: from all.")]
TopP = Annotated[
    float | None, Option(help="Draw from the likeliest tokens of this total probability; default: from all.")
]
MinP = Annotated[
    float | None, Option(help="Draw from tokens at least this likely, as a part of the likeliest one.")
]
Seed = Annotated[int, Option(help="Of the random draws.")]
RepetitionPenalty = Annotated[
    float | None, Option(help="Above 1: tokens that occurred become less likely; default: the checkpoint's.")
]
PromptLookup = Annotated[
    int | None, Option(min=1, help="Draft this many tokens from the text so far; the answer stays the same.")
]


def numbers(name: str, text: str, *, least: int) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        ValueError: something else, or a number below `least`.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(int(part))
        except ValueError:
            raise UserError(f"--{name} {text}: {part!r} is not a whole number") from None
        if found[-1] < least:
            raise UserError(f"--{name} {text}: {part} must be at least {least}")
    return found


def generation_options(
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    prompt_lookup: int | None,
) -> dict[str, Any]:
    """The arguments of generate that these options stand for.

    Whether and how tokens are drawn is said here alone, whatever the checkpoint's generation_config.json has.
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
                f"--{name.replace('_', '-')} {value} does nothing without draws; add --temperature 0.7, say"
            )
    return options
