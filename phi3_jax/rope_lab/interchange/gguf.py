"""Rope scalings as the tensors and the metadata of GGUF files, which llama.cpp reads."""

import math
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from phi3_jax.checkpoint.gguf_config import ROPE_TENSORS, read_config
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.interchange.factors import rope_factors
from phi3_jax.rope_lab.interchange.transformers import check_family, native_entry
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.sources.gguf_file import GGUFFile
from phi3_jax.sources.gguf_writing import Value, write_gguf
from phi3_jax.storage.outputs import replacing
from phi3_jax.storage.targets import Target

_SINGLE, _LONG, _SHORT = ROPE_TENSORS
_SCALING = "rope.scaling"


class GGUFRope(NamedTuple):
    """What a GGUF file says about rope."""

    architecture: str
    metadata: Mapping[str, Value]
    """Values by their full keys."""
    tensors: Mapping[str, Float[np.ndarray, "P"]]

    @property
    def has_two_lists(self) -> bool:
        """Whether llama.cpp chooses between two different lists of factors."""
        return _LONG in self.tensors and not np.array_equal(self.tensors[_LONG], self.tensors[_SHORT])


def gguf_rope(config: Phi3Config, architecture: str = "phi3") -> GGUFRope:
    """Returns the metadata and the tensors that have the effect of a config's rope in llama.cpp.

    Linear and the default YaRN have names there. Everything else becomes lists of factors, by which llama.cpp
    divides the angles: one list for a Llama, `rope_freqs.weight`, or a short and a long one. llama.cpp reads
    YaRN's `beta_fast` and `beta_slow` from its own options, not from a file of these architectures, so that
    other values of them become a list, too. It multiplies `attn_factor` with YaRN's own 0.1 ln(factor) + 1.

    Raises:
        UserError: llama.cpp cannot express the rope, or the config is of another family.
    """
    check_family(config, architecture)
    values: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rotary_dim,
        f"{_SCALING}.original_context_length": config.original_max_position_embeddings,
    }
    tensors: dict[str, Float[np.ndarray, P]] = {}
    factors = rope_factors(config, "llama.cpp")
    entry = native_entry(config)
    if entry["rope_type"] == "default":
        values[f"{_SCALING}.type"] = "none"
    elif entry["rope_type"] == "linear":
        values |= {f"{_SCALING}.type": "linear", f"{_SCALING}.factor": float(entry["factor"])}
    elif entry["rope_type"] == "yarn" and _is_default_yarn(entry):
        own = 0.1 * math.log(entry["factor"]) + 1
        values |= {
            f"{_SCALING}.type": "yarn",
            f"{_SCALING}.factor": float(entry["factor"]),
            f"{_SCALING}.original_context_length": entry["original_max_position_embeddings"],
            f"{_SCALING}.attn_factor": factors.attention / own,
        }
    else:
        values[f"{_SCALING}.attn_factor"] = factors.attention
        short, long = (np.asarray(each, np.float32) for each in (factors.short, factors.long))
        if architecture == "llama" and np.array_equal(short, long) and (long != 1).any():
            tensors[_SINGLE] = long
        else:
            values[f"{_SCALING}.type"] = "longrope"
            tensors |= {_LONG: long, _SHORT: short}
    return GGUFRope(architecture, {f"{architecture}.{key}": each for key, each in values.items()}, tensors)


def _is_default_yarn(entry: Mapping[str, object]) -> bool:
    """Whether the frequencies are those that llama.cpp computes without options."""
    own = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    return all(entry.get(key, value) == value for key, value in own.items())


def write_gguf_rope(target: Target, rope: GGUFRope, model: Path | None = None, *, show: bool = False) -> None:
    """Writes a GGUF file with a rope, as a whole.

    Args:
        target: the file to write.
        rope: what to write.
        model: a GGUF file of which a copy is written, with this rope in place of its own. Its weights are
            copied as they are stored. Without it, the file has nothing but the rope.
        show: whether to print progress.

    Raises:
        CheckpointError: the model cannot be read.
        UserError: the model has another architecture or number of rotary dims than the rope.
    """
    source = None if model is None else GGUFFile(model)
    metadata = dict(rope.metadata)
    if source is not None:
        metadata |= _checked(source, rope)
    prefixes = tuple(f"{rope.architecture}.rope.scal{ending}" for ending in ("ing.", "e_linear"))
    start = monotonic()
    with replacing(target) as work, FileProgress(1, show) as progress:

        def report(done: int, total: int) -> None:
            left = (monotonic() - start) * (total / done - 1)
            text = f"{done / 1e9:,.2f} of {total / 1e9:,.2f} GB"
            progress.update(text, done / total, time_left(left))

        write_gguf(
            work,
            rope.architecture,
            metadata,
            rope.tensors,
            source=source,
            is_replaced=lambda name: name in ROPE_TENSORS or name.startswith(prefixes),
            on_written=report,
        )


def _checked(model: GGUFFile, rope: GGUFRope) -> dict[str, Value]:
    """Checks that a rope fits a model, and returns metadata that must not change with its context length."""
    if model.architecture != rope.architecture:
        raise UserError(
            f"{model.path} is of architecture {model.architecture!r}, the rope is for {rope.architecture!r}"
        )
    config = Phi3Config.from_dict(read_config(model), model.path)
    dims = rope.metadata[f"{rope.architecture}.rope.dimension_count"]
    if config.rotary_dim != dims:
        raise UserError(
            f"{model.path} rotates {config.rotary_dim} dims of each head, and the rope has {dims}; export it "
            "for this model"
        )
    window = f"{model.architecture}.attention.sliding_window"
    # Readers know the window of old files by their context length.
    return {window: config.sliding_window} if config.sliding_window and not model.metadata(window) else {}
