"""Compares ropes by perplexity at several context lengths, with one model, text and set of programs."""

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
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss, Window, windows
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import Scorer, frequencies_for, frequencies_key
from phi3_jax.evaluation.texts import first_tokens, read_text, text_digest
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.comparison.compile_time import CompileTime
from phi3_jax.rope_lab.comparison.facts import FactCell, FactText, FactTexts, answers_found
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.targets import Target, target_in
from phi3_jax.tokenizer import Phi3Tokenizer

Key = tuple[str, Window | FactText]
"""The key of a measurement: the key of the frequencies (`frequencies_key`), and what is scored."""


@dataclass(frozen=True)
class Rope:
    """A rope under comparison."""

    name: str
    config: Phi3Config
    initial_tokens: int

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that determine its frequencies, for JSON."""
        return {
            **self.config.rope_parameters,
            "max_position_embeddings": self.config.max_position_embeddings,
            "original_max_position_embeddings": self.config.original_max_position_embeddings,
            "initial_tokens": self.initial_tokens,
        }

    def key(self, scored: Window | FactText) -> Key:
        """Returns the key of a measurement."""
        return frequencies_key(self.config, scored.length, self.initial_tokens), scored


class Cell(NamedTuple):
    """The result of one rope at one length."""

    rope: str
    length: int
    stride: int
    loss: TextLoss
    seconds: float
    """Time of the forward passes, without compilation."""


@dataclass(frozen=True)
class Comparison:
    """The results, with the ropes in the user's order and ascending lengths."""

    ropes: Sequence[Rope]
    lengths: Sequence[int]
    cells: Sequence[Cell]
    facts: Sequence[FactCell]
    """Empty without `needles`."""
    options: Mapping[str, Any]
    tokens: int
    """Tokens of the text without the skipped ones; every length scores all of them but the first."""
    trained: Phi3Config
    """The model's own config."""
    seconds: Mapping[str, float]
    """Times of this call ("forward", "compile", "all"), without those of earlier calls."""

    def cell(self, rope: str, length: int) -> Cell:
        return next(cell for cell in self.cells if (cell.rope, cell.length) == (rope, length))

    def fact_cell(self, rope: str, length: int) -> FactCell:
        return next(cell for cell in self.facts if (cell.rope, cell.length) == (rope, length))


def compare_ropes(
    model: Path,
    text: Path,
    output: Target,
    arguments: Sequence[RopeArgument],
    *,
    lengths: Sequence[int],
    stride: int | None = None,
    max_tokens: int | None = None,
    skip_tokens: int = 0,
    facts: int = 0,
    fact_texts: int = 1,
    dtype: Any = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Comparison:
    """Measures the sliding perplexity of the start of a text, under each rope at each length.

    All lengths score the same tokens once, the first `max_tokens` except the first one. They differ in how
    much earlier text a token sees. A window is measured once for the same frequencies: neither for two ropes
    with the same frequencies at its length, nor again if an earlier call, with any ropes and lengths,
    measured it with the same model and text.

    Args:
        lengths: tokens of a window.
        stride: tokens between windows, at most each length; default: half of it.
        max_tokens: tokens of the text; default: the longest length, which then has one window.
        skip_tokens: tokens to skip at the start of the text, such as those used by a search for factors.
        facts: also ask for this many facts that are hidden in the text, at each length; 0: for none.
        fact_texts: how many texts of each length have facts.
        overwrite: start over if the output is of another model or text.

    Raises:
        UserError: an option is wrong, the text is too short, or a length does not fit in memory; it is raised
            before any work.
    """
    began = monotonic()
    lengths = sorted(set(lengths))
    max_tokens = max_tokens or lengths[-1]
    checkpoint = open_checkpoint(model)
    ropes = named_ropes(arguments, checkpoint.config)
    content = read_text(text)
    tokenizer = checkpoint.source.tokenizer()
    tokens = first_tokens(tokenizer, content, skip_tokens + max_tokens)[skip_tokens:]
    _check_length(text, len(tokens), lengths, max_tokens, skip_tokens)
    hidden = _fact_texts(tokenizer, content, skip_tokens, lengths, facts, fact_texts)
    plan = {length: windows(len(tokens), length, min(stride or length // 2, length)) for length in lengths}
    options = model_options(model, dtype, mesh)
    options |= {"text_digest": text_digest(content), "skip_tokens": skip_tokens}
    with (
        Journal(target_in(output, STATE), options, overwrite=overwrite) as journal,
        CompileTime() as compiling,
    ):
        forward = 0.0
        scored: dict[int, list[Window | FactText]] = {
            length: [*chosen, *hidden.at(length)] for length, chosen in plan.items()
        }
        if missing := _missing(scored, ropes, journal):
            planned = Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh))
            planned.check_memory(max(each.length for _, each in missing))
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)
            forward = _measure(scorer, tokens, hidden, missing, journal, compiling, show=show)
        measured = _measured(journal)
    cells = [_cell(rope, length, chosen, measured) for rope in ropes for length, chosen in plan.items()]
    fact_cells = [
        _fact_cell(rope, length, hidden.at(length), measured)
        for rope in ropes
        for length in (lengths if facts else ())
    ]
    options |= {"text": str(text), "stride": stride, "max_tokens": max_tokens}
    options |= {"facts": facts, "fact_texts": fact_texts}
    seconds = {"forward": forward, "compile": compiling.seconds, "all": monotonic() - began}
    return Comparison(ropes, lengths, cells, fact_cells, options, len(tokens), checkpoint.config, seconds)


def _fact_texts(
    tokenizer: Phi3Tokenizer, content: str, skip: int, lengths: Sequence[int], facts: int, count: int
) -> FactTexts:
    needed = skip + count * max(lengths) if facts else 0
    # One more for a token at the start that is special; a fact's text is between others.
    start = len(tokenizer.encode("")) + skip
    tokens = first_tokens(tokenizer, content, start + needed)[start:]
    return FactTexts(tokenizer, tokens, lengths, facts, count)


def named_ropes(arguments: Sequence[RopeArgument], config: Phi3Config) -> list[Rope]:
    """Returns the ropes that a user named, for a model of `config`.

    Raises:
        UserError: a name is given twice, or as `RopeArgument.apply`.
    """
    names = [argument.name for argument in arguments]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--rope {sorted(twice)[0]} is given twice")
    return [Rope(one.name, one.apply(config), one.initial_tokens) for one in arguments]


def _check_length(text: Path, tokens: int, lengths: Sequence[int], max_tokens: int, skipped: int) -> None:
    if tokens >= lengths[-1]:
        return
    if max_tokens < lengths[-1]:
        raise UserError(f"max_tokens={max_tokens:,} is less than the longest length, {lengths[-1]:,}")
    after = f" after the {skipped:,} that are skipped" if skipped else ""
    raise UserError(
        f"{text} has {tokens:,} tokens{after}, fewer than the length {lengths[-1]:,}; give a longer text or "
        "shorter lengths"
    )


def _missing(
    plan: Mapping[int, Sequence[Window | FactText]], ropes: Sequence[Rope], journal: Journal
) -> dict[Key, tuple[Rope, str]]:
    """Returns the measurements that the journal lacks, each with its rope and a label."""
    measured = _measured(journal)
    missing: dict[Key, tuple[Rope, str]] = {}
    for (length, chosen), rope in product(plan.items(), ropes):
        for each in chosen:
            if (key := rope.key(each)) not in measured:
                missing.setdefault(key, (rope, f"{rope.name} at {length:,}"))
    return missing


def _measure(
    scorer: Scorer,
    tokens: Int[np.ndarray, " T"],
    hidden: FactTexts,
    missing: Mapping[Key, tuple[Rope, str]],
    journal: Journal,
    compiling: CompileTime,
    *,
    show: bool,
) -> float:
    """Measures what is missing one by one; returns the seconds of the forward passes."""
    total = sum(each.length - 1 for _, each in missing)
    done, forward, began = 0, 0.0, monotonic()
    with FileProgress(total, show) as bar:

        def update(label: str, more: int) -> None:
            nonlocal done
            done += more
            seconds = monotonic() - began
            left = time_left((total - done) * seconds / done)
            bar.update(f"{label}, {done / seconds:,.0f} tokens/s", done, left)

        for number, ((key, each), (rope, label)) in enumerate(missing.items(), start=1):
            if isinstance(each, Window):
                part, scored_from = tokens[each.begin : each.end], each.scored_from - each.begin
            else:
                sample = hidden.sample(each)
                part, scored_from = sample.tokens, sample.scored_from
            inv_freq, scaling = frequencies_for(rope.config, len(part))
            started, compiled = monotonic(), compiling.seconds
            scores = scorer.score(
                part,
                inv_freq,
                scaling,
                initial_tokens=rope.initial_tokens,
                scored_from=scored_from,
                progress=partial(update, f"{label}, measurement {number} of {len(missing)}"),
            )
            seconds = monotonic() - started - (compiling.seconds - compiled)
            forward += seconds
            entry: dict[str, Any] = {"rope": key, "seconds": seconds}
            if isinstance(each, Window):
                entry |= {"window": list(each), "loss": float(scores.total[0])}
            else:
                loss, found = answers_found(sample, scores)
                tokens_asked = int(sample.scored.sum())
                entry |= {"facts": list(each), "loss": loss, "found": found, "tokens": tokens_asked}
            journal.add([entry])
    return forward


def _measured(journal: Journal) -> dict[Key, Mapping[str, Any]]:
    """Returns the entries by their keys."""
    return {
        (entry["rope"], FactText(*entry["facts"]) if "facts" in entry else Window(*entry["window"])): entry
        for entry in journal.entries
    }


def _cell(
    rope: Rope, length: int, chosen: Sequence[Window], measured: Mapping[Key, Mapping[str, Any]]
) -> Cell:
    results = [measured[rope.key(window)] for window in chosen]
    loss = math.fsum(float(each["loss"]) for each in results)
    stride = chosen[1].begin if len(chosen) > 1 else length
    text_loss = TextLoss(loss, sum(window.scored for window in chosen))
    return Cell(rope.name, length, stride, text_loss, sum(each["seconds"] for each in results))


def _fact_cell(
    rope: Rope, length: int, texts: Sequence[FactText], measured: Mapping[Key, Mapping[str, Any]]
) -> FactCell:
    results = [measured[rope.key(text)] for text in texts]
    loss = math.fsum(float(each["loss"]) for each in results)
    return FactCell(
        rope.name,
        length,
        TextLoss(loss, sum(each["tokens"] for each in results)),
        sum(each["found"] for each in results),
        sum(text.facts for text in texts),
    )


def scaled_frequencies(comparison: Comparison) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields each rope's name, and its wavelengths in tokens and factors by pair at the longest length.

    The factors are relative to the wavelengths that the model was trained with.
    """
    plain = comparison.trained.rope_base.inv_freq().astype(np.float64)
    for rope in comparison.ropes:
        inv_freq, _ = frequencies_for(rope.config, comparison.lengths[-1])
        yield rope.name, 2 * math.pi / inv_freq.astype(np.float64), plain / inv_freq
