"""Finds the critical pair of a model by experiment: measures an objective for each candidate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from jax.sharding import Mesh

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import OnProgress, Scorer
from phi3_jax.evaluation.texts import read_text, text_digest
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.critical.candidates import crossing
from phi3_jax.rope_lab.critical.plan import (
    Candidate,
    CriticalPlan,
    MeasuredScaling,
    PairEffect,
    PairScaling,
)
from phi3_jax.rope_lab.objectives.objectives import Losses, RopeObjective, ScoredRope, measure
from phi3_jax.rope_lab.objectives.options import ObjectiveOptions
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.targets import Target, target_in

MeasureScalings = Callable[[Sequence[PairScaling], OnProgress], Sequence[Losses]]
"""Returns the losses of ropes by length; calls its second argument with the tokens that were read."""


@dataclass(frozen=True)
class CriticalPair:
    """The perplexities of candidates, of usual methods, and of single pairs."""

    base: RopeBase
    """Its lengths are the trained one and the one that was measured."""
    candidates: Sequence[Candidate]
    best: Candidate
    known: Mapping[str, MeasuredScaling]
    """The usual methods."""
    effects: Sequence[PairEffect]
    options: Mapping[str, Any]
    new: int
    """Ropes that this call measured; an earlier call measured the others."""
    seconds: float

    @property
    def crossing(self) -> int | None:
        """The pair from which single pairs are better stretched than plain; None if it is not known."""
        if not self.effects:
            return None
        return crossing(
            {each.pair: math.log(each.plain) for each in self.effects},
            {each.pair: math.log(each.stretched) for each in self.effects},
        )


def find_critical_pair(
    model: Path,
    text: Path,
    output: Target,
    *,
    objective: ObjectiveOptions,
    candidates: Sequence[int] | None = None,
    yarn_attention: bool = False,
    pairs: Sequence[int] | Literal["all"] = (),
    trained: int | None = None,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> CriticalPair:
    """Measures an objective for candidates of the critical pair, for usual methods, and for single pairs.

    The ropes are those of `CriticalPlan`. The results of each batch are written to `output`/state.json; after
    a kill the same call resumes, and a call with further candidates or pairs adds them.

    Args:
        model: a checkpoint; factors are relative to plain rope with its theta.
        objective: the objective, of one length: the one to stretch the model to.
        candidates, yarn_attention, pairs: as `CriticalPlan` has them; "all" stands for all pairs.
        trained: the length that the model was trained on; default: by its config.
        batch_size: ropes at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: start over if the output was started with other options.

    Raises:
        UserError: an option is wrong, the text is too short, or the batch does not fit in memory; it is
            raised before any work.
    """
    began = monotonic()
    checkpoint = open_checkpoint(model)
    base = _base(checkpoint.config, objective, trained)
    single = range(base.dim // 2) if pairs == "all" else pairs
    plan = CriticalPlan(base, candidates, yarn_attention, single)
    content = read_text(text)
    scored, _ = objective.make(checkpoint.source.tokenizer(), content, str(text))
    options = model_options(model, dtype, mesh) | asdict(objective)
    options |= {"text_digest": text_digest(content), "batch_size": batch_size}
    options |= {"trained_length": base.original_max_position_embeddings}
    with Journal(target_in(output, STATE), options, overwrite=overwrite) as journal:
        values = _values(journal, scored)
        before = len(values)
        if plan.waiting(values):
            planned = Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh))
            rows = batch_size or journal.decide("batch_size", lambda: scored.rows(planned))
            scored.check_memory(planned, rows)
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)

            def measure_scalings(batch: Sequence[PairScaling], progress: OnProgress) -> Sequence[Losses]:
                ropes = [ScoredRope.from_factors(base, *each) for each in batch]
                return measure(scorer, scored, ropes, rows, progress)

            run(plan, scored, journal, measure_scalings, rows, show=show)
            values = _values(journal, scored)
    return CriticalPair(
        base,
        plan.measured(values),
        plan.best(values),
        {name: MeasuredScaling(each, values[each]) for name, each in plan.known.items()},
        plan.effects(values),
        {"text": str(text), **options},
        len(values) - before,
        monotonic() - began,
    )


def run(
    plan: CriticalPlan,
    objective: RopeObjective,
    journal: Journal,
    measure_scalings: MeasureScalings,
    rows: int,
    *,
    show: bool,
) -> None:
    """Measures `rows` ropes at a time until none is waiting; writes each batch."""
    began, before, tokens_read = monotonic(), len(journal.entries), 0
    with FileProgress(100, show) as bar:
        values = _values(journal, objective)
        while waiting := plan.waiting(values):
            most = len(journal.entries) - before + len(waiting) + plan.later(values)

            def progress(tokens: int, most: int = most) -> None:
                nonlocal tokens_read
                tokens_read += tokens
                done = tokens_read / objective.tokens_to_read
                seconds = (monotonic() - began) * (most / done - 1)
                text = f"rope {before + math.ceil(done)} of at most {before + most}"
                bar.update(text, 100 * (before + done) / (before + most), time_left(seconds))

            batch = waiting[:rows]
            losses = measure_scalings(batch, progress)
            journal.add(_entry(*each) for each in zip(batch, losses, strict=True))
            values = _values(journal, objective)


def _base(config: Phi3Config, objective: ObjectiveOptions, trained: int | None) -> RopeBase:
    """Returns the rope base with the lengths of the experiment."""
    (length,) = objective.lengths
    trained = trained_length(config) if trained is None else trained
    if not 2 <= trained < length:
        raise UserError(
            f"length={length} must be more than the {trained} tokens that the model was trained on, and they "
            "at least 2: otherwise nothing is stretched"
        )
    return replace(config.rope_base, max_position_embeddings=length, original_max_position_embeddings=trained)


def _entry(scaling: PairScaling, losses: Losses) -> dict[str, Any]:
    sums = {str(length): [loss.loss, loss.tokens] for length, loss in losses.items()}
    return scaling._asdict() | {"losses": sums}


def _values(journal: Journal, objective: RopeObjective) -> dict[PairScaling, float]:
    """Returns the perplexity of each rope in the journal."""
    return {
        PairScaling(tuple(entry["factors"]), entry["attention_factor"]): objective.value(
            {int(length): TextLoss(float(loss), tokens) for length, (loss, tokens) in entry["losses"].items()}
        )
        for entry in journal.entries
    }
