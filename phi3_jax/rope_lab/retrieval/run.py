"""Measures retrieval tasks over lengths and depths under several ropes, and resumes after a kill."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from jax.sharding import Mesh

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import frequencies_key
from phi3_jax.evaluation.texts import read_text, text_digest
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.comparison.compare import Rope
from phi3_jax.rope_lab.retrieval.measure import Answerer, RopeCase, Trial, batches, most_rows, rope_cases
from phi3_jax.rope_lab.retrieval.prompts import Case, PromptSize, RetrievalPrompts
from phi3_jax.rope_lab.retrieval.tasks import Task
from phi3_jax.rope_lab.retrieval.texts import FILLER
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.targets import Target, target_in

Key = tuple[str, str, int, int, float | None, int]
"""The key of an answer: of the frequencies, the task with its parameters, the most tokens of an answer, and
length, depth and trial."""


@dataclass(frozen=True)
class RetrievalResult:
    """Trials by task, length, rope, depth and number, and the options they depend on."""

    trials: list[Trial]
    tasks: Sequence[Task]
    options: Mapping[str, Any]
    new: int
    """Answers of this call; the others are of an earlier call, or of a rope with the same frequencies."""
    seconds: float


def run_retrieval(
    model: Path,
    output: Target,
    arguments: Sequence[RopeArgument],
    *,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 5,
    max_new_tokens: int | None = None,
    raw: bool = False,
    text: Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> RetrievalResult:
    """Measures tasks with `trials` prompts for each length and depth, the same under all ropes.

    The answers of each batch are written to `output`/state.json; after a kill the same call resumes. An
    answer is generated once for the same prompt and frequencies: neither for two ropes with the same
    frequencies at its length, nor again if an earlier call had any tasks, lengths and ropes in common.

    Args:
        model: a checkpoint; it is loaded once, and all ropes run in the same programs.
        lengths: tokens of prompt and answer together.
        depths: depths of the line that is asked for, from 0 (start) to 1 (end).
        max_new_tokens: the most tokens of an answer; default: by the task.
        raw: use no chat template and end the prompt with the start of the answer, as without a template.
        text: a file whose lines are the filler; default: lines of our own.
        batch_size: prompts at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: start over if the output is of another model, text, seed or template.

    Raises:
        UserError: an option is wrong, or a prompt does not fit in memory; it is raised before any work.
    """
    _check_different({"rope": [rope.name for rope in arguments], "length": lengths, "depth": depths})
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    ropes = [Rope(each.name, each.apply(config), each.initial_tokens) for each in arguments]
    content = None if text is None else read_text(text)
    prompts = RetrievalPrompts(
        checkpoint.source.tokenizer(),
        tasks,
        raw=raw,
        filler=FILLER if content is None else content.splitlines(),
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    prompts.check(lengths)
    options = model_options(model, dtype, mesh)
    options |= {
        "template": prompts.template,
        "seed": seed,
        "text_digest": content and text_digest(content),
    }
    plan = [
        (_key(rope, case, prompts), (rope, case))
        for rope, case in rope_cases(ropes, prompts.cases(lengths, depths, trials))
    ]
    began = monotonic()
    with Journal(target_in(output, STATE), options, overwrite=overwrite) as journal:
        before = len(journal.entries)
        answered = _answered(journal)
        if missing := {key: pair for key, pair in plan if key not in answered}:
            longest = config.replace(max_position_embeddings=max(*lengths, config.max_position_embeddings))
            load: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "config": longest}
            planned = CompiledModel(load_abstract(Phi3ForCausalLM, checkpoint, **load))
            rows = _rows(missing.values(), prompts, planned, journal, batch_size)
            answerer = Answerer(Pipeline.load(checkpoint, **load).compiled, prompts, ropes)
            _answer(missing.values(), prompts, rows, answerer, journal, show)
        answered, new = _answered(journal), len(journal.entries) - before
    options |= {
        "ropes": [rope.name for rope in ropes],
        "tasks": [task.label for task in tasks],
        "lengths": list(lengths),
        "depths": list(depths),
        "trials": trials,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    done = [
        Trial(rope.name, *case, answers, text, prompts.score(case, answers, text))
        for (rope, case), (answers, text) in ((pair, answered[key]) for key, pair in plan)
    ]
    return RetrievalResult(done, tasks, options, new, monotonic() - began)


def _check_different(options: Mapping[str, Sequence[Any]]) -> None:
    for name, values in options.items():
        for value in values:
            if list(values).count(value) > 1:
                raise UserError(f"{name} {value} is given twice; give it once")


def _key(rope: Rope, case: Case, prompts: RetrievalPrompts) -> Key:
    size, task = prompts.size(case), prompts.task(case.task)
    frequencies = frequencies_key(rope.config, case.length, rope.initial_tokens)
    return frequencies, task.label, *size, case.depth, case.trial


def _answered(journal: Journal) -> dict[Key, tuple[tuple[str, ...], str]]:
    """Returns what a right answer has and the model's answer, by key."""
    return {tuple(entry["key"]): (tuple(entry["answers"]), entry["text"]) for entry in journal.entries}


def _rows(
    pairs: Iterable[RopeCase],
    prompts: RetrievalPrompts,
    planned: CompiledModel,
    journal: Journal,
    wanted: int | None,
) -> dict[PromptSize, int]:
    """Returns the prompts at a time by size; checks the longest first, so that errors come early."""
    rows = {}
    for size in sorted({prompts.size(case) for _, case in pairs}, reverse=True):
        most = partial(most_rows, planned, size, wanted)
        # What memory has room for is decided once, so that another machine gives the same answers.
        rows[size] = most() if wanted else journal.decide(f"rows_{size.length}_{size.answer_tokens}", most)
    return rows


def _answer(
    pairs: Iterable[RopeCase],
    prompts: RetrievalPrompts,
    rows: Mapping[PromptSize, int],
    answerer: Answerer,
    journal: Journal,
    show: bool,
) -> None:
    """Answers all pairs, and writes each batch before the next starts."""
    planned = list(batches(pairs, prompts, rows))
    began, total = monotonic(), sum(map(len, planned))
    ends = np.cumsum([sum(case.length for _, case in batch) for batch in planned])  # in tokens
    scores: list[float] = []
    with FileProgress(int(ends[-1]), show) as progress:
        for batch, end in zip(planned, ends.tolist(), strict=True):
            trials = answerer.answer(batch, rows[prompts.size(batch[0][1])])
            journal.add(
                {"key": _key(rope, case, prompts), "answers": trial.answers, "text": trial.text}
                for (rope, case), trial in zip(batch, trials, strict=True)
            )
            scores += [trial.score for trial in trials]
            text = f"{len(scores):,} of {total:,} prompts, {np.mean(scores):.0%} found"
            progress.update(text, end, time_left((monotonic() - began) * (ends[-1] / end - 1)))
