"""The examples of a run: rows of files, data sets or the package's own, tokenised and divided."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.data.examples import Examples
from phi3_jax.data.generated import generated_rows
from phi3_jax.data.labels import Labels
from phi3_jax.data.packing import PackedExamples, pack
from phi3_jax.data.rows import BadRows, Row, read_dataset, read_rows
from phi3_jax.data.tasks import CausalLM, SequenceClassification, Task, TokenClassification, encode_rows
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.tokenizer import Phi3Tokenizer

from .settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What is learned from and scored on."""

    task: Task
    labels: Labels | None
    train: Examples | PackedExamples
    validation: Examples
    test: Examples | None
    counts: dict[str, int]
    """For the report."""
    class_weights: tuple[float, ...] | None

    def fingerprint(self) -> str:
        """Of everything, so that a resumed run can tell that its data changed."""
        return "-".join(
            part.fingerprint()[:16] for part in (self.train, self.validation, self.test) if part is not None
        )


def make_task(settings: Settings) -> Task:
    """The task that the settings name."""
    if settings.task == "sequence-classification":
        label = settings.label_column
        return SequenceClassification(
            text=settings.text_column,
            text_pair=settings.text_pair_column,
            label=label if isinstance(label, str) else tuple(label),
            problem_type=settings.problem_type,
            label_separator=settings.label_separator,
            max_length=settings.max_length,
        )
    if settings.task == "token-classification":
        return TokenClassification(
            words=settings.words_column,
            labels=settings.tags_column,
            label_all_pieces=settings.label_all_pieces,
            max_length=settings.max_length,
        )
    messages = settings.messages_column or ("messages" if settings.generated else None)
    return CausalLM(messages=messages, text=settings.text_column, max_length=settings.max_length)


def load_data(settings: Settings, tokenizer: Phi3Tokenizer, config: Phi3Config) -> Data:
    """Reads, tokenises and divides the rows.

    Raises:
        ValueError, OSError: files that are absent or broken, bad rows, no label that can be learned.
    """
    task = make_task(settings)
    bad = BadRows(settings.skip_bad_rows)
    labels = task.label_set(_rows(settings, "train", task, BadRows(skip=True)))
    counts: dict[str, int] = {}

    def examples(split: str) -> Examples:
        found = Examples.gather(
            encode_rows(task, _rows(settings, split, task, bad), tokenizer, labels, bad=bad)
        )
        if not len(found):
            raise UserError(f"the {split} rows hold no example")
        counts[f"{split} examples"] = len(found)
        if cut := int(np.count_nonzero(found.truncated)):
            counts[f"{split} examples cut"] = cut
            logger.warning(
                "%d of %d %s examples are longer than max_length=%d tokens and were cut",
                *(cut, len(found), split, settings.max_length),
            )
        return found

    train: Examples | PackedExamples = examples("train")
    assert isinstance(train, Examples)
    if _has(settings, "validation"):
        validation = examples("validation")
    else:
        train, validation = train.split(settings.validation_fraction, settings.seed)
        counts |= {"train examples": len(train), "validation examples": len(validation)}
    test = examples("test") if _has(settings, "test") else None
    if bad.count:
        counts["bad rows skipped"] = bad.count
        logger.warning("%d bad rows were skipped; the first: %s", bad.count, "; ".join(bad.first))
    weights = _class_weights(settings, labels, train)
    if settings.packing:
        # A row is turned by one of longrope's lists; short examples beside a long one would get its list.
        switch = (
            config.original_max_position_embeddings if config.rope_scaling.rope_type == "longrope" else None
        )
        groups = None if switch is None else (train.lengths > switch).astype(np.int8)
        train = PackedExamples(train, pack(train.lengths, settings.max_length, groups=groups))
        counts["train rows, packed"] = len(train)
    return Data(task, labels, train, validation, test, counts, weights)


def _has(settings: Settings, split: str) -> bool:
    if settings.dataset is not None:
        return split in settings.dataset_splits
    return settings.generated or getattr(settings, f"{split}_file") is not None


def _rows(settings: Settings, split: Any, task: Task, bad: BadRows) -> Iterable[Row]:
    if settings.generated:
        return generated_rows(split, settings.task)
    if settings.dataset is not None:
        return read_dataset(settings.dataset, settings.dataset_splits[split])
    path = getattr(settings, f"{split}_file")
    return read_rows(path, file_format=settings.file_format, columns=task.columns, bad=bad)


def _class_weights(settings: Settings, labels: Labels | None, train: Examples) -> tuple[float, ...] | None:
    """By class id: as given, or, balanced, examples / (classes x examples of the class)."""
    asked = settings.class_weights
    if asked is None:
        return None
    if labels is None or settings.problem_type == "regression":
        raise UserError("class_weights are for classes, and there are none here")
    if isinstance(asked, dict):
        if set(asked) != set(labels.names):
            odd = sorted(set(asked) ^ set(labels.names))
            raise UserError(
                f"class_weights must name each label once; {', '.join(map(repr, odd[:5]))} differ"
            )
        return tuple(asked[name] for name in labels.names)
    if settings.task == "token-classification":
        each = np.concatenate([train.token_labels(index) for index in range(len(train))])
        counts = np.bincount(each[each != IGNORE_INDEX], minlength=len(labels))
    elif settings.problem_type == "multi_label_classification":
        raise UserError("class_weights=balanced is for a single label a row; give a weight for each label")
    else:
        assert train.labels is not None
        counts = np.bincount(train.labels, minlength=len(labels))
    if not counts.all():
        name = labels.names[int(np.argmin(counts))]
        raise UserError(f"class_weights=balanced: no training example has the label {name!r}")
    return tuple((counts.sum() / (len(counts) * counts)).tolist())
