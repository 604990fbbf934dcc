"""Perplexity by context length under several ropes: one model, the same tokens, the same programs."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.compile_time import CompileTime
from phi3_jax.evaluation.perplexity import TextLoss, Window, windows
from phi3_jax.evaluation.scorer import Scorer, frequencies_for, frequencies_key
from phi3_jax.evaluation.texts import first_tokens, read_text
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.journal import Journal
from phi3_jax.runs.progress import FileProgress

STATE = "state.json"
"""Of a comparison's directory: every window that was measured."""


Key = tuple[str, Window]
"""Of what is measured: the frequencies, as `frequencies_key` has them, and the window."""


@dataclass(frozen=True)
class Rope:
    """A rope under comparison."""

    name: str
    config: Phi3Config
    initial_tokens: int

    @property
    def parameters(self) -> dict[str, Any]:
        """What its frequencies follow from, for JSON."""
        return {
            **self.config.rope_parameters,
            "max_position_embeddings": self.config.max_position_embeddings,
            "original_max_position_embeddings": self.config.original_max_position_embeddings,
            "initial_tokens": self.initial_tokens,
        }

    def key(self, window: Window) -> Key:
        """By which what was measured is known again."""
        return frequencies_key(self.config, window.end - window.begin, self.initial_tokens), window


class Cell(NamedTuple):
    """One rope at one length."""

    rope: str
    length: int
    stride: int
    loss: TextLoss
    seconds: float
    """Of forward passes, compilation left out."""


@dataclass(frozen=True)
class Comparison:
    """What was measured, the ropes in the user's order, lengths ascending."""

    ropes: Sequence[Rope]
    lengths: Sequence[int]
    cells: Sequence[Cell]
    asked: Mapping[str, Any]
    tokens: int
    """Of the text, from its first or from those skipped; all of them are scored at every length, but one."""
    trained: Phi3Config
    """The model's own config."""
    seconds: Mapping[str, float]
    """forward, compile and all: of this call; what an earlier one had measured is not in them."""

    def cell(self, rope: str, length: int) -> Cell:
        return next(cell for cell in self.cells if (cell.rope, cell.length) == (rope, length))


def compare_ropes(
    model: Path,
    text: Path,
    output: Path,
    arguments: Sequence[RopeArgument],
    *,
    lengths: Sequence[int],
    stride: int | None = None,
    max_tokens: int | None = None,
    skip_tokens: int = 0,
    dtype: Any = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Comparison:
    """Sliding perplexity of a text's beginning, under each rope at each length.

    All lengths score the same tokens, the first `max_tokens` but the very first, each once: what differs is
    how much of the text before a token the model sees. A window is measured once under the same frequencies:
    not again where an earlier call measured it on the same model and text, whatever ropes and lengths that
    was asked for, nor for two ropes that are the same at its length.

    Args:
        lengths: of the windows, in tokens.
        stride: between windows, at most each length; default: half of it.
        max_tokens: of the text; default: the longest length, which is then one window.
        skip_tokens: at the text's beginning, such as those that a search for factors has seen.
        overwrite: begin anew where the output is of another model or text.

    Raises:
        ValueError: what was asked cannot be done, before any work: a text shorter than the longest length, a
            rope that the model cannot have, a length that memory cannot hold.
    """
    began = monotonic()
    lengths = sorted(set(lengths))
    checkpoint = open_checkpoint(model)
    ropes = _ropes(arguments, checkpoint.config)
    content = read_text(text)
    max_tokens = max_tokens or lengths[-1]
    tokens = first_tokens(checkpoint.source.tokenizer(), content, skip_tokens + max_tokens)[skip_tokens:]
    _check_length(text, len(tokens), lengths, max_tokens, skip_tokens)
    plan = {length: windows(len(tokens), length, min(stride or length // 2, length)) for length in lengths}
    asked = {
        "model": str(model.resolve()),
        "model_files": fingerprint(model),
        "text_digest": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
        "skip_tokens": skip_tokens,
        "dtype": str(dtype),
        "mesh": None if mesh is None else dict(mesh.shape),
    }
    with Journal(output / STATE, asked, overwrite=overwrite) as journal, CompileTime() as compiling:
        known = _measured(journal)
        missing: dict[Key, tuple[Rope, str]] = {}
        for (length, found), rope in product(plan.items(), ropes):
            for window in found:
                if (key := rope.key(window)) not in known:
                    missing.setdefault(key, (rope, f"{rope.name} at {length:,}"))
        forward = 0.0
        if missing:
            longest = max(window.end - window.begin for _, window in missing)
            Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh)).check_memory(longest)
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)
            forward = _measure(scorer, tokens, missing, journal, compiling, show=show)
        known = _measured(journal)
        return Comparison(
            ropes,
            lengths,
            [_cell(rope, length, found, known) for rope in ropes for length, found in plan.items()],
            asked | {"text": str(text), "stride": stride, "max_tokens": max_tokens},
            len(tokens),
            checkpoint.config,
            {"forward": forward, "compile": compiling.seconds, "all": monotonic() - began},
        )


def _ropes(arguments: Sequence[RopeArgument], config: Phi3Config) -> list[Rope]:
    names = [argument.name for argument in arguments]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--rope {sorted(twice)[0]} is given twice")
    return [Rope(one.name, one.apply(config), one.initial_tokens) for one in arguments]


def _check_length(text: Path, tokens: int, lengths: Sequence[int], max_tokens: int, skipped: int) -> None:
    if tokens >= lengths[-1]:
        return
    if max_tokens < lengths[-1]:
        raise UserError(f"max_tokens={max_tokens:,} is less than the longest length, {lengths[-1]:,}")
    behind = f" behind the {skipped:,} that are skipped" if skipped else ""
    raise UserError(
        f"{text} has {tokens:,} tokens{behind}, fewer than the length {lengths[-1]:,}; give a longer text or "
        "shorter lengths"
    )


def _measure(
    scorer: Scorer,
    tokens: Int[np.ndarray, " T"],
    missing: Mapping[Key, tuple[Rope, str]],
    journal: Journal,
    compiling: CompileTime,
    *,
    show: bool,
) -> float:
    """Measures what is missing, a window at a time; gives seconds of forward passes."""
    total = sum(window.end - window.begin - 1 for _, window in missing)
    done, forward, began = 0, 0.0, monotonic()
    with FileProgress(total, show) as bar:

        def tell(label: str, more: int) -> None:
            nonlocal done
            done += more
            seconds = monotonic() - began
            left = round((total - done) * seconds / done)
            bar.update(
                f"{label}, {done / seconds:,.0f} tokens/s",
                done,
                f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            )

        for number, ((key, window), (rope, label)) in enumerate(missing.items(), start=1):
            part = tokens[window.begin : window.end]
            inv_freq, scaling = frequencies_for(rope.config, len(part))
            started, compiled = monotonic(), compiling.seconds
            (loss,) = scorer.score(
                part,
                inv_freq,
                scaling,
                initial_tokens=rope.initial_tokens,
                scored_from=window.scored_from - window.begin,
                progress=partial(tell, f"{label}, window {number} of {len(missing)}"),
            ).total
            seconds = monotonic() - started - (compiling.seconds - compiled)
            forward += seconds
            journal.add([{"rope": key, "window": list(window), "loss": float(loss), "seconds": seconds}])
    return forward


def _measured(journal: Journal) -> dict[Key, tuple[float, float]]:
    """Loss and seconds."""
    return {
        (entry["rope"], Window(*entry["window"])): (float(entry["loss"]), entry["seconds"])
        for entry in journal.entries
    }


def _cell(
    rope: Rope,
    length: int,
    found: Sequence[Window],
    known: Mapping[Key, tuple[float, float]],
) -> Cell:
    measured = [known[rope.key(window)] for window in found]
    loss = TextLoss(math.fsum(loss for loss, _ in measured), sum(window.scored for window in found))
    stride = found[1].begin if len(found) > 1 else length
    return Cell(rope.name, length, stride, loss, sum(seconds for _, seconds in measured))


def scaled_frequencies(comparison: Comparison) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of each rope at the longest length: wavelengths in tokens, and the factors on the plain ones, by pair.

    Plain are those that the model was trained with.
    """
    plain = comparison.trained.rope_base.inv_freq().astype(np.float64)
    for rope in comparison.ropes:
        inv_freq, _ = frequencies_for(rope.config, comparison.lengths[-1])
        yield rope.name, 2 * math.pi / inv_freq.astype(np.float64), plain / inv_freq
