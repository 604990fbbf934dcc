"""The measurements of a study: perplexity and retrieval of every model under its rope."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.rope_lab.comparison.compare import compare_ropes
from phi3_jax.rope_lab.study.plan import BASE, folder
from phi3_jax.rope_lab.study.results import PerplexityRow, RetrievalRow, StudyResults, StudyRope, TrainingRow
from phi3_jax.rope_lab.study.retrieval import measure_retrieval
from phi3_jax.rope_lab.study.ropes import ResolvedRope, factors_at, kind_of
from phi3_jax.rope_lab.study.stages import StudyStages
from phi3_jax.storage.fetch import display_name
from phi3_jax.storage.targets import Target


def measure(
    study: StudyStages, ropes: Mapping[str, ResolvedRope], runs: Iterable[tuple[str, str]], base: Path
) -> StudyResults:
    """Measures every model; returns all numbers of the study."""
    settings, config = study.settings, open_checkpoint(base).config
    perplexities: list[PerplexityRow] = []
    retrievals: list[RetrievalRow] = []
    trainings = [] if settings.base is None else [_training(study, BASE, "", "full")]
    for name, trained in runs:
        model = base if trained == "none" else study.model(folder("finetune", name, trained))
        perplexities += [
            PerplexityRow(name, trained, row["length"], float(row["perplexity"]), row["tokens"])
            for row in _perplexities(study, ropes[name], trained, model)
        ]
        retrievals += [
            RetrievalRow(name, trained, **row) for row in _retrievals(study, ropes[name], trained, model)
        ]
        if trained != "none":
            trainings.append(_training(study, folder("finetune", name, trained), name, trained))
    return StudyResults(
        name=str(settings.output_dir).rstrip("/").rpartition("/")[2],
        model="trained from scratch" if settings.base is not None else display_name(base),
        original=trained_length(config),
        length=settings.length,
        ropes=[
            StudyRope(
                name,
                rope.text,
                kind_of(settings.ropes[name].rope),
                settings.ropes[name].is_mixed,
                *factors_at(rope.config(config), settings.length),
            )
            for name, rope in ropes.items()
        ],
        perplexities=perplexities,
        retrievals=retrievals,
        trainings=trainings,
    )


def _perplexities(study: StudyStages, rope: ResolvedRope, trained: str, model: Path) -> list[dict[str, Any]]:
    settings = study.settings

    def work(output: Target) -> list[dict[str, Any]]:
        compared = compare_ropes(
            model,
            study.part("test"),
            output,
            [rope.argument],
            lengths=settings.compare.lengths,
            stride=settings.compare.stride,
            max_tokens=settings.compare.max_tokens,
            dtype=settings.dtype,
            mesh=study.mesh,
            show=study.show,
        )
        return [
            {"length": cell.length, "perplexity": cell.loss.perplexity, "tokens": cell.loss.tokens}
            for cell in compared.cells
        ]

    rows: list[dict[str, Any]] = study.run(
        folder("compare", rope.name, trained), f"perplexity under {_title(rope, trained)}", work
    )
    return rows


def _retrievals(study: StudyStages, rope: ResolvedRope, trained: str, model: Path) -> list[dict[str, Any]]:
    settings = study.settings
    retrieve = settings.retrieve
    if retrieve is None:
        return []
    raw = retrieve.raw or settings.base is not None

    def work(output: Target) -> list[dict[str, Any]]:
        common: dict[str, Any] = {"dtype": settings.dtype, "mesh": study.mesh, "show": study.show}
        return measure_retrieval(model, output, rope.argument, retrieve, raw=raw, **common)

    rows: list[dict[str, Any]] = study.run(
        folder("retrieve", rope.name, trained), f"retrieval under {_title(rope, trained)}", work
    )
    return rows


def _training(study: StudyStages, name: str, rope: str, trained: str) -> TrainingRow:
    result = study.record.result(name, study.options[name])
    return TrainingRow(rope, trained, seconds=study.record.seconds(name), **result)


def _title(rope: ResolvedRope, trained: str) -> str:
    return rope.name if trained == "none" else f"{rope.name} ({trained})"
