"""The training of a study: the base from scratch, and under each rope."""

import os
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.rope_lab.study.plan import BASE, BASE_DATA, DATA, NEW, folder
from phi3_jax.rope_lab.study.retrieval import TrainingPrompts
from phi3_jax.rope_lab.study.ropes import ResolvedRope, is_packable
from phi3_jax.rope_lab.study.stages import StudyStages
from phi3_jax.rope_lab.study.texts import Mixture, write_examples
from phi3_jax.runs.text import parse_json
from phi3_jax.storage.targets import Target, read_bytes, target_in
from phi3_jax.tokenizer import Phi3Tokenizer
from phi3_jax.train.finetune import finetune
from phi3_jax.train.logs import LOG
from phi3_jax.train.settings import Settings

LAST = 10
"""The last steps, whose mean loss is that of a training run."""

SAVE_MINUTES = 2.0
"""Time between two checkpoints, by default; a kill loses no more."""

BASE_VALIDATION = 64
"""Windows of the validation part that score the base."""


def train_base(study: StudyStages) -> Path:
    """Trains the model from scratch; returns its path."""
    settings, new = study.settings.base, study.model(NEW)
    assert settings is not None
    length = settings.length

    def work(output: Target) -> dict[str, Any]:
        prompts = TrainingPrompts(Phi3Tokenizer.from_pretrained(new), study.settings.training_tasks())
        tokens = _tokens(settings.train, length)
        lengths = (prompts.shortest, length)
        mixture = Mixture(
            tokens,
            length,
            retrieval_share=settings.retrieval_share,
            retrieval_lengths=lengths,
            repetition_share=settings.repetition_share,
            vocab_size=settings.vocab_size,
        )
        data = study.folder(BASE_DATA)
        files = {
            "train_file": _write_mixture(study, new, target_in(data, "train.jsonl"), mixture),
            "validation_file": _write_validation(study, new, data, length, BASE_VALIDATION),
        }
        given = settings.train | files | {"trained": "full", "max_length": length, "packing": True}
        return _finetune(study, output, new, given)

    study.run(BASE, "train the base model", work)
    return study.model(BASE)


def train_rope(study: StudyStages, rope: ResolvedRope, trained: str, base: Path) -> None:
    """Fine-tunes the base model under a rope.

    A row of several examples needs the same frequencies for all of them. A rope that depends on the length
    other than by two lists is trained on long windows only, so that its steps have as many tokens.
    """
    settings = study.settings.finetune
    assert settings is not None
    length = study.settings.length
    packing = is_packable(rope.config(open_checkpoint(base).config), length)

    written = study.run(
        DATA, "write the examples for fine-tuning", lambda at: _write_mixtures(study, base, at)
    )
    files = {"train_file": written["mixed" if packing else "long"], "validation_file": written["validation"]}
    given = settings.train | files | {"max_length": length, "packing": packing}

    def work(output: Target) -> dict[str, Any]:
        return _finetune(study, output, base, given | {"trained": trained, "rope": rope.text})

    study.run(folder("finetune", rope.name, trained), f"train under {rope.name} ({trained})", work)


def _write_mixtures(study: StudyStages, base: Path, output: Target) -> dict[str, str]:
    """Writes the examples that all fine-tuned models share; returns the files."""
    settings, length = study.settings.finetune, study.settings.length
    assert settings is not None
    prompts = TrainingPrompts(Phi3Tokenizer.from_pretrained(base), study.settings.training_tasks())
    original = trained_length(open_checkpoint(base).config)
    long_only = Mixture(_tokens(settings.train, length), length)
    mixed = Mixture(
        long_only.tokens,
        length,
        short_length=original,
        short_share=settings.short_share,
        retrieval_share=settings.retrieval_share,
        retrieval_lengths=(min(max(original + 1, prompts.shortest), length), length),
    )
    return {
        "mixed": _write_mixture(study, base, target_in(output, "mixed.jsonl"), mixed),
        "long": _write_mixture(study, base, target_in(output, "long.jsonl"), long_only),
        "validation": _write_validation(study, base, output, length, settings.validation_windows),
    }


def _write_mixture(study: StudyStages, model: Path, target: Target, mixture: Mixture) -> str:
    """Writes the examples of a mixture; returns the file."""
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    draws = np.random.default_rng(study.settings.seed)
    prompts = TrainingPrompts(tokenizer, study.settings.training_tasks())
    write_examples(target, mixture.examples(study.ids("train", tokenizer), prompts, draws))
    return os.fspath(target)


def _write_validation(study: StudyStages, model: Path, output: Target, length: int, most: int) -> str:
    """Writes windows of the validation part, evenly spread over it; returns the file."""
    ids = study.ids("validation", Phi3Tokenizer.from_pretrained(model))
    count = min(most, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    target = target_in(output, "validation.jsonl")
    write_examples(target, (ids[start : start + length] for start in starts))
    return os.fspath(target)


def _finetune(study: StudyStages, output: Target, model: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Trains a model as `phi3-jax finetune` does; returns its steps and losses."""
    rows = given.get("train_batch_size", Settings.model_fields["train_batch_size"].default)
    usual = {
        "eval_batch_size": rows,
        "save_minutes": None if given.get("save_strategy") in ("best", "no") else SAVE_MINUTES,
        "keep_checkpoints": False,
        "report_to": "none",
    }
    own = {
        "task": "causal-lm",
        "input_ids_column": "input_ids",
        "model": os.fspath(model),
        "output_dir": os.fspath(output),
        "seed": study.settings.seed,
    }
    settings = Settings(**usual | given | own)
    metrics = finetune(settings, mesh=study.mesh, cache_dir=study.cache_dir, show=study.show)
    lines = read_bytes(target_in(output, LOG)).decode().splitlines()
    records = [parse_json(line, LOG) for line in lines]
    losses = [float(record["loss"]) for record in records if record["kind"] == "train"]
    return {
        "steps": settings.max_steps,
        "loss": fmean(losses[-LAST:]),
        "validation_loss": metrics["validation"]["loss"],
    }


def _tokens(train: dict[str, Any], length: int) -> int:
    """Returns the tokens of all rows of a training run."""
    settings = Settings(task="causal-lm", **train)
    assert settings.max_steps is not None
    return settings.max_steps * settings.train_batch_size * length
