"""The report of a study, whose numbers are all in `results.json`."""

import json
from collections.abc import Iterator, Sequence

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.result_files import write_figure
from phi3_jax.rope_lab.study.figures import (
    beside_figure,
    factors_figure,
    perplexity_figure,
    relative_perplexities,
    retrieval_figure,
    title_of,
)
from phi3_jax.rope_lab.study.findings import findings
from phi3_jax.rope_lab.study.results import RetrievalRow, StudyResults
from phi3_jax.runs.json_values import json_value
from phi3_jax.runs.tables import markdown_table
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, read_bytes, remove, target_in

RESULTS, REPORT = "results.json", "report.md"
PERPLEXITY, RETRIEVAL, FACTORS, BESIDE = "perplexity.png", "retrieval.png", "factors.png", "beside.png"
FILES = (RESULTS, REPORT, PERPLEXITY, RETRIEVAL, FACTORS, BESIDE)


def read_results(directory: Target) -> StudyResults:
    """Returns the results of a finished study.

    Raises:
        UserError: the directory has none.
    """
    file = target_in(directory, RESULTS)
    try:
        return StudyResults.from_dict(json.loads(read_bytes(file)))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no {file}; give the directory of a finished study") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not of a study: {error!r}") from error


def write_study_report(output: Target, results: StudyResults, others: Sequence[StudyResults] = ()) -> None:
    """Writes results.json, report.md and the figures, each as a whole.

    Args:
        others: studies whose perplexities are shown beside.
    """
    content = json.dumps(json_value(results.to_dict()), indent=2, ensure_ascii=False)
    write_text(target_in(output, RESULTS), content + "\n")
    figures = {PERPLEXITY: perplexity_figure(results), FACTORS: factors_figure(results)}
    if results.retrievals:
        figures[RETRIEVAL] = retrieval_figure(results)
    if others:
        figures[BESIDE] = beside_figure([results, *others])
    for name in (PERPLEXITY, RETRIEVAL, FACTORS, BESIDE):
        if name in figures:
            write_figure(target_in(output, name), figures[name])
        else:
            remove(target_in(output, name))  # of an earlier report
    write_text(target_in(output, REPORT), "\n".join(_lines(results, others)) + "\n")


def _lines(results: StudyResults, others: Sequence[StudyResults]) -> Iterator[str]:
    yield f"# Ropes from {results.original:,} to {results.length:,} tokens\n"
    yield f"Base model: {results.model}. It was trained on texts of {results.original:,} tokens.\n"
    yield "## Findings\n"
    yield from _findings(results)
    yield "\n## Perplexity\n"
    yield from _perplexities(results)
    yield f"\n![Perplexity by length]({PERPLEXITY})"
    if results.retrievals:
        yield "\n## Retrieval\n"
        yield from _retrievals(results)
        yield f"\n![Right answers by length]({RETRIEVAL})"
    yield "\n## Short context\n"
    yield from _regressions(results)
    yield "\n## Training\n"
    yield from _trainings(results)
    yield "\n## Ropes\n"
    rows = [(rope.name, rope.rope, f"{rope.attention_factor:.4f}") for rope in results.ropes]
    yield from markdown_table(("rope", "`--rope`", "attention factor"), rows)
    yield f"\n![Factors of wavelengths at {results.length:,} tokens]({FACTORS})"
    if others:
        yield "\n## Other studies\n"
        yield from _beside([results, *others])


def _findings(results: StudyResults) -> Iterator[str]:
    rows = [(each.claim, each.verdict, each.numbers) for each in findings(results)]
    yield from markdown_table(("claim", "here", "perplexities"), rows)
    yield "\nRules:\n"
    for each in findings(results):
        yield f"- {each.claim} ({each.source}): {each.rule}"


def _perplexities(results: StudyResults) -> Iterator[str]:
    tokens = sorted({row.tokens for row in results.perplexities})
    counts = " to ".join(f"{count:,}" for count in dict.fromkeys((tokens[0], tokens[-1])))
    yield f"Of {counts} tokens of the test part, which no model was trained on.\n"
    rows = [
        (rope.name, title_of(trained).lower(), *(_number(value) for value in values))
        for trained in results.trained
        for rope in results.ropes
        if any(values := [results.perplexity(rope.name, trained, length) for length in results.lengths])
    ]
    yield from markdown_table(("rope", "training", *(f"{length:,}" for length in results.lengths)), rows)


def _retrievals(results: StudyResults) -> Iterator[str]:
    lengths = sorted({row.length for row in results.retrievals})
    cells = {(row.rope, row.trained, row.task, row.length): row for row in results.retrievals}
    keys = dict.fromkeys((row.task, row.trained, row.rope) for row in results.retrievals)
    prompts = sorted({row.prompts for row in results.retrievals})
    counts = " or ".join(f"{count:,}" for count in prompts)
    yield f"Sums of scores (the share of right values in an answer) of {counts} prompts for each length.\n"
    rows = [
        (
            task,
            rope,
            title_of(trained).lower(),
            *(_rate(cells.get((rope, trained, task, n))) for n in lengths),
        )
        for task, trained, rope in keys
    ]
    yield from markdown_table(("task", "rope", "training", *(f"{length:,}" for length in lengths)), rows)


def _regressions(results: StudyResults) -> Iterator[str]:
    """Yields the perplexities up to the original length, relative to those of the base under plain rope."""
    lengths = [length for length in results.lengths if length <= results.original]
    base = {length: results.best(results.of_kind("plain"), "none", length) for length in lengths}
    if not lengths or any(value is None for value in base.values()):
        yield "Not measured: it needs untrained plain rope, and a length up to the original one."
        return
    yield "Perplexity relative to that of the base under plain rope.\n"

    def ratio(rope: str, trained: str, length: int) -> str:
        value, own = results.perplexity(rope, trained, length), base[length]
        return "" if value is None or own is None else f"{value / own[1]:.3f}"

    rows = [
        (rope.name, title_of(trained).lower(), *(ratio(rope.name, trained, length) for length in lengths))
        for trained in results.trained
        for rope in results.ropes
        if results.perplexity(rope.name, trained, lengths[0]) is not None
    ]
    yield from markdown_table(("rope", "training", *(f"{length:,}" for length in lengths)), rows)


def _trainings(results: StudyResults) -> Iterator[str]:
    if not results.trainings:
        yield "Nothing was trained."
        return
    rows = [
        (
            row.rope or "base model",
            title_of(row.trained).lower(),
            f"{row.steps:,}",
            f"{row.seconds:,.0f}",
            f"{row.loss:.4f}",
            f"{row.validation_loss:.4f}",
        )
        for row in results.trainings
    ]
    yield from markdown_table(
        ("rope", "training", "steps", "seconds", "loss at the end", "validation loss"), rows
    )


def _beside(studies: Sequence[StudyResults]) -> Iterator[str]:
    yield "Perplexity relative to that of each base within its original length.\n"
    stretches = sorted({length / study.original for study in studies for length in study.lengths})
    rows = []
    for study in studies:
        for trained in study.trained:
            for name, lengths, ratios in relative_perplexities(study, trained):
                cells = dict(zip(lengths, ratios, strict=True))
                shown = [f"{cells[each]:.3f}" if each in cells else "" for each in stretches]
                rows.append((study.name, name, title_of(trained).lower(), *shown))
    yield from markdown_table(("study", "rope", "training", *(f"{each:g} times" for each in stretches)), rows)
    yield f"\n![Perplexity of all studies by relative length]({BESIDE})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _rate(row: RetrievalRow | None) -> str:
    return "" if row is None else f"{row.right:.4g} ({row.rate:.0%})"
