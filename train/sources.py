"""The examples of a run: rows of files, of data sets or generated ones, tokenised and split."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.data.arrow_rows import read_dataset
from phi3_jax.data.examples import Examples
from phi3_jax.data.folders import files_of
from phi3_jax.data.generated import generated_rows
from phi3_jax.data.labels import Labels
from phi3_jax.data.packing import PackedExamples, pack
from phi3_jax.data.reading import good_rows, read_items
from phi3_jax.data.rows import BadRowError, BadRows, Row, TextFormat
from phi3_jax.data.tasks import CausalLM, SequenceClassification, Task, TokenClassification, encode_rows
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.storage.fetch import fetch
from phi3_jax.tokenizer import Phi3Tokenizer

from .labels import BaseHead, ModelLabels, given_labels, match_labels
from .settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The examples that a run trains on and is scored on."""

    task: Task
    labels: Labels | None
    """Of the model."""
    base_rows: tuple[int, ...] | None
    """The row of the base's head that each label starts from; None: the head is new."""
    all_labels: Labels | None
    """Those of the model, then those that only validation and test rows have."""
    train: Examples | PackedExamples
    validation: Examples
    test: Examples | None
    counts: dict[str, int]
    """How many examples of each kind there are, for the report."""
    class_weights: tuple[float, ...] | None

    def fingerprint(self) -> str:
        """Returns a digest of all examples, by which a resumed run notices that its data changed."""
        return "-".join(
            part.fingerprint()[:16] for part in (self.train, self.validation, self.test) if part is not None
        )


def make_task(settings: Settings, config: Phi3Config) -> Task:
    """Returns the task that the settings name, for a model of this config."""
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
            prefix_space=settings.prefix_space,
            max_length=settings.max_length,
        )
    messages = settings.messages_column
    if messages is None and settings.input_ids_column is None:
        messages = "messages" if settings.generated else _found_messages(settings)
    return CausalLM(
        messages=messages,
        text=settings.text_column,
        input_ids=settings.input_ids_column,
        max_length=settings.max_length,
        dummy_token_ids=config.dummy_token_ids,
        vocab_size=config.vocab_size,
    )


def _found_messages(settings: Settings) -> str | None:
    """Returns the column of conversations in the first row; None if the row has the column of texts.

    Raises:
        UserError: the row has neither, but a prompt and a completion.
    """
    rows = good_rows(_read(settings, "train"), BadRows(skip=True))
    first = next(iter(rows), None)
    if first is None or settings.text_column in first.values:
        return None
    for name in ("messages", "conversations"):
        if isinstance(first.values.get(name), list):
            logger.warning("learning the answers in %r, as there is no column %r", name, settings.text_column)
            return name
    if {"prompt", "completion"} <= first.values.keys():
        raise UserError(
            f"{first.place}: prompt and completion are not read; write messages, as in "
            '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, '
            "or one text"
        )
    return None


def load_data(
    settings: Settings, tokenizer: Phi3Tokenizer, config: Phi3Config, base: BaseHead | None = None
) -> Data:
    """Reads, tokenises and splits the rows.

    Raises:
        UserError, OSError: files are missing or broken, rows are bad, or there is no label to learn.
    """
    task = make_task(settings, config)
    bad = BadRows(settings.skip_bad_rows)
    model = _model_labels(settings, task, base)
    labels, base_rows = (None, None) if model is None else (model.labels, model.base_rows)
    all_labels = labels
    counts: dict[str, int] = {}

    def examples(split: str) -> Examples:
        items = _items(settings, split, task)
        gathered = Examples.gather(encode_rows(task, items, tokenizer, all_labels, bad=bad))
        if not len(gathered):
            raise UserError(f"the {split} rows hold no example. {bad.summary()}".strip())
        counts[f"{split} examples"] = len(gathered)
        if cut := int(np.count_nonzero(gathered.truncated)):
            counts[f"{split} examples cut"] = cut
            logger.warning(
                "%d of %d %s examples are longer than max_length=%d tokens and were cut",
                *(cut, len(gathered), split, settings.max_length),
            )
        return gathered

    train = examples("train")
    if all_labels is not None:
        all_labels = _with_unknown(all_labels, settings, task)
    if _has(settings, "validation"):
        validation = examples("validation")
    else:
        members = None if labels is None else _members(settings, train, len(labels))
        train, validation = train.split(settings.validation_fraction, settings.seed, members)
        if labels is not None and settings.problem_type != "regression":
            _warn_of_absent_labels(settings, labels, validation)
        counts |= {"train examples": len(train), "validation examples": len(validation)}
    test = examples("test") if _has(settings, "test") else None
    if bad.count:
        counts["bad rows skipped"] = bad.count
        logger.warning("%s", bad.summary())
    weights = _class_weights(settings, labels, train)
    rows: Examples | PackedExamples = train
    if settings.packing:
        rows = _pack(train, settings.max_length, config)
        counts["train rows, packed"] = len(rows)
    return Data(task, labels, base_rows, all_labels, rows, validation, test, counts, weights)


def _model_labels(settings: Settings, task: Task, base: BaseHead | None) -> ModelLabels | None:
    """Returns the labels of the model; None for a language model."""
    given = given_labels(settings)
    bad = BadRows(settings.skip_bad_rows)
    labels = given or task.label_set(_rows(settings, "train", task, bad), bad)
    if labels is None:
        return None
    columns = isinstance(task, SequenceClassification) and task.has_label_columns
    kind = settings.task if settings.task == "token-classification" else settings.problem_type
    return match_labels(labels, base, kind, ordered=columns or given is not None)


def _with_unknown(labels: Labels, settings: Settings, task: Task) -> Labels:
    """Returns the labels and those that only validation or test rows have, which the model cannot predict."""
    every = labels
    for split in ("validation", "test"):
        if settings.generated or not _has(settings, split):
            continue
        counts: Counter[str] = Counter()
        for row in _rows(settings, split, task, BadRows(skip=True)):
            with suppress(BadRowError):  # reported when the row is encoded
                counts.update(set(task.label_names(row)) - set(labels.names))
        if counts:
            shown = ", ".join(f"{name!r} ({count})" for name, count in counts.most_common(5))
            more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
            logger.warning(
                "%s rows have labels that the model does not have: %s%s. They count as wrong, and the loss "
                "leaves them out",
                *(split, shown, more),
            )
            every = every.extended(counts)
    return every


def _members(settings: Settings, examples: Examples, labels: int) -> np.ndarray | None:
    """Returns which labels each example has, [examples, labels]; None if each has one class or numbers."""
    if settings.task == "token-classification":
        members = np.zeros((len(examples), labels), bool)
        for index, row in enumerate(members):
            tags = examples.token_labels(index)
            row[tags[tags != IGNORE_INDEX]] = True
        return members
    if settings.problem_type != "multi_label_classification" or examples.labels is None:
        return None
    return np.asarray(examples.labels > 0)


def _warn_of_absent_labels(settings: Settings, labels: Labels, validation: Examples) -> None:
    members = _members(settings, validation, len(labels))
    if members is not None:
        present = np.any(members, axis=0, keepdims=False)
    else:
        assert validation.labels is not None
        present = np.isin(np.arange(len(labels)), validation.labels)
    absent = [name for name, there in zip(labels.names, present, strict=True) if not there]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        logger.warning(
            "no validation row has the label %s%s: too few rows have it for validation_fraction=%g. Metrics "
            "say nothing about it; give a larger fraction, or a validation_file",
            *(", ".join(map(repr, absent[:5])), more, settings.validation_fraction),
        )


def _pack(train: Examples, width: int, config: Phi3Config) -> PackedExamples:
    """Packs examples into rows of `width` tokens.

    The rope frequencies of a row follow from its longest example, so all its examples must have the same.

    Raises:
        UserError: the frequencies change with the length other than between two lists.
    """
    rope, base = config.rope_scaling, config.rope_base
    switch = rope.switches_at(base)
    if switch is not None:
        groups = (train.lengths > switch).astype(np.int8)
        return PackedExamples(train, pack(train.lengths, width, groups=groups))
    by_length = rope.frequencies(base, jnp.array([1, width]))
    if any(isinstance(x, jax.Array) and not np.array_equal(x[0], x[1]) for x in by_length):
        raise UserError(
            f"packing=True needs the same rope frequencies for all examples of a row, and those of "
            f"{rope.rope_type!r} change with the length up to max_length={width}; set packing to false, or a "
            "smaller max_length"
        )
    return PackedExamples(train, pack(train.lengths, width))


def _has(settings: Settings, split: str) -> bool:
    if settings.dataset is not None:
        return split in settings.dataset_splits
    return settings.generated or getattr(settings, f"{split}_file") is not None


def _rows(settings: Settings, split: Any, task: Task, bad: BadRows) -> Iterable[Row]:
    return good_rows(_items(settings, split, task), bad)


def _items(settings: Settings, split: Any, task: Task) -> Iterable[Row | BadRowError]:
    return _read(settings, split, task.columns, task.optional_columns)


def _read(
    settings: Settings, split: Any, columns: Collection[str] = (), optional: Collection[str] = ()
) -> Iterable[Row | BadRowError]:
    if settings.generated:
        return generated_rows(split, settings.task)
    if settings.dataset is not None:
        return read_dataset(settings.dataset, settings.dataset_splits[split])
    given = getattr(settings, f"{split}_file")
    text = TextFormat(settings.encoding, settings.quoting, tuple(settings.column_names or ()))
    options: Any = {"columns": columns, "optional": optional, "text": text}
    paths = [
        path
        for each in ([given] if isinstance(given, str) else given)
        for path in files_of(fetch(each), split=split, file_format=settings.file_format)
    ]
    # All files are looked for before the first row is read.
    return chain.from_iterable(
        [read_items(path, file_format=settings.file_format, **options) for path in paths]
    )


def _class_weights(settings: Settings, labels: Labels | None, train: Examples) -> tuple[float, ...] | None:
    """Returns the weights by class id: the given ones, or examples / (classes x examples of the class)."""
    weights = settings.class_weights
    if weights is None:
        return None
    if labels is None or settings.problem_type == "regression":
        raise UserError("class_weights are for classes, and there are none here")
    if isinstance(weights, dict):
        if set(weights) != set(labels.names):
            odd = sorted(set(weights) ^ set(labels.names))
            raise UserError(
                f"class_weights must name each label once; {', '.join(map(repr, odd[:5]))} differ"
            )
        return tuple(weights[name] for name in labels.names)
    if settings.task == "token-classification":
        tags = np.concatenate([train.token_labels(index) for index in range(len(train))])
        counts = np.bincount(tags[tags != IGNORE_INDEX], minlength=len(labels))
    elif settings.problem_type == "multi_label_classification":
        raise UserError("class_weights=balanced is for a single label a row; give a weight for each label")
    else:
        assert train.labels is not None
        counts = np.bincount(train.labels, minlength=len(labels))
    if not counts.all():
        name = labels.names[int(np.argmin(counts))]
        raise UserError(f"class_weights=balanced: no training example has the label {name!r}")
    return tuple((counts.sum() / (len(counts) * counts)).tolist())
