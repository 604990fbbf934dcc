"""Inspects the attention of a model on a text, under several ropes and at several lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import Scorer, frequencies_for, frequencies_key
from phi3_jax.evaluation.texts import first_tokens, read_text, text_digest
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.comparison.compare import Rope, named_ropes
from phi3_jax.rope_lab.inspection.attention_profiles import (
    QUERIES,
    SINK_TOKENS,
    AttentionProfile,
    attention_profile,
    check_inspection,
    check_memory,
    sample_positions,
)
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.targets import Target, target_in

Key = tuple[str, int]
"""The key of a measurement: the key of the frequencies (`frequencies_key`), and the length."""


@dataclass(frozen=True)
class Inspection:
    """The mean profiles, with the ropes in the user's order and ascending lengths."""

    ropes: Sequence[Rope]
    lengths: Sequence[int]
    profiles: Mapping[tuple[str, int], AttentionProfile]
    """By the name of the rope and the length."""
    options: Mapping[str, Any]
    trained: Phi3Config
    """The model's own config."""
    new: int
    """Measurements of this call; the others are those of earlier calls."""
    seconds: float


def inspect_ropes(
    model: Path,
    text: Path,
    output: Target,
    arguments: Sequence[RopeArgument],
    *,
    lengths: Sequence[int],
    queries: int = QUERIES,
    sink_tokens: int = SINK_TOKENS,
    skip_tokens: int = 0,
    dtype: Any = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Inspection:
    """Measures the attention of sampled tokens of a text, under each rope at each length.

    The texts are the first tokens of one text. A measurement is made once for the same frequencies, also over
    several calls with the same output.

    Args:
        lengths: tokens of the texts.
        queries: sampled tokens of a text, see `sample_positions`.
        sink_tokens: first tokens whose attention is that of the sink.
        skip_tokens: tokens to skip at the start of the text.
        overwrite: start over if the output is of another model, text or sample.

    Raises:
        UserError: an option is wrong, the text is too short, the model has block-sparse layers, or a length
            does not fit in memory; it is raised before any work.
    """
    began = monotonic()
    lengths = sorted(set(lengths))
    for length in lengths:
        sample_positions(length, queries)
    checkpoint = open_checkpoint(model)
    check_inspection(checkpoint.config)
    ropes = named_ropes(arguments, checkpoint.config)
    content = read_text(text)
    tokens = first_tokens(checkpoint.source.tokenizer(), content, skip_tokens + lengths[-1])[skip_tokens:]
    if len(tokens) < lengths[-1]:
        after = f" after the {skip_tokens:,} that are skipped" if skip_tokens else ""
        raise UserError(
            f"{text} has {len(tokens):,} tokens{after}, fewer than the length {lengths[-1]:,}; give a longer "
            "text or shorter lengths"
        )
    options = model_options(model, dtype, mesh) | {
        "text_digest": text_digest(content),
        "skip_tokens": skip_tokens,
        "queries": queries,
        "sink_tokens": sink_tokens,
    }
    with Journal(target_in(output, STATE), options, overwrite=overwrite) as journal:
        measured = _measured(journal)
        missing: dict[Key, Rope] = {}
        for length, rope in product(lengths, ropes):
            if (key := _key(rope, length)) not in measured:
                missing.setdefault(key, rope)
        if missing:
            planned = Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh))
            check_memory(planned, max(length for _, length in missing))
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)
            _measure(scorer, tokens, missing, journal, queries, sink_tokens, show=show)
        measured = _measured(journal)
    profiles = {(rope.name, length): measured[_key(rope, length)] for rope, length in product(ropes, lengths)}
    options |= {"text": str(text)}
    seconds = monotonic() - began
    return Inspection(ropes, lengths, profiles, options, checkpoint.config, len(missing), seconds)


def _key(rope: Rope, length: int) -> Key:
    return frequencies_key(rope.config, length, rope.initial_tokens), length


def _measure(
    scorer: Scorer,
    tokens: Int[np.ndarray, " T"],
    missing: Mapping[Key, Rope],
    journal: Journal,
    queries: int,
    sink_tokens: int,
    *,
    show: bool,
) -> None:
    """Measures the missing profiles one by one."""
    total = sum(length + queries for _, length in missing)
    done, began = 0, monotonic()
    with FileProgress(total, show) as bar:
        for (name, length), rope in missing.items():

            def update(more: int, label: str = f"{rope.name} at {length:,}") -> None:
                nonlocal done
                done += more
                seconds = monotonic() - began
                left = time_left((total - done) * seconds / done)
                bar.update(f"{label}, {done / seconds:,.0f} tokens/s", done, left)

            profile = attention_profile(
                scorer,
                tokens[:length],
                *frequencies_for(rope.config, length),
                initial_tokens=rope.initial_tokens,
                positions=sample_positions(length, queries),
                sink_tokens=sink_tokens,
                progress=update,
            )
            means = {field: value.tolist() for field, value in profile.mean()._asdict().items()}
            journal.add([{"rope": name, "length": length, **means}])


def _measured(journal: Journal) -> dict[Key, AttentionProfile]:
    return {
        (entry["rope"], entry["length"]): AttentionProfile(
            *(np.array(entry[field]) for field in AttentionProfile._fields)
        )
        for entry in journal.entries
    }
