"""A fine-tuned classifier: rows in, predictions out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phi3_jax.checkpoint import CheckpointError
from phi3_jax.classification.head import Head
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.encoding import Example, encode_items
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import Batch, load
from phi3_jax.data.rows import BadRowError, Place, Row
from phi3_jax.data.tasks import SequenceClassification, TokenClassification
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.lora import ModelPaths, find_model, load_merged, open_model
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.quantization import Quantization
from phi3_jax.runs.json_values import ADAPTER, RUN
from phi3_jax.runs.text import read_json
from phi3_jax.sizes import round_up
from phi3_jax.tokenizer import Phi3Tokenizer
from phi3_jax.trainer.batches import check_rows, to_devices, width_multiple

ClassifierTask = SequenceClassification | TokenClassification
"""How rows are read, without labels."""

Text = str | tuple[str, str] | Sequence[str] | Mapping[str, Any]
"""A text, a pair of texts, a list of words, or a row with its columns."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows that can be classified, and the example of each."""

    rows: list[Row]
    examples: Examples


class Classifier:
    """A model with a classification head, its tokenizer, and the task that reads its rows.

    Rows are sorted by length into batches of a few widths, each compiled once. The other rows of its batch
    change a row's predictions by no more than rounding.

    Args:
        model: a `Phi3ForSequenceClassification` or `Phi3ForTokenClassification`.
        task: columns and maximum length; default: texts or words of at most 512 tokens.
        batch_size: rows of a batch, over all devices.
        threshold: the probability above which one of several labels is chosen; default: 0.5.

    Raises:
        UserError: the model or the task is of another kind, the rows do not divide over the model's mesh, or
            the threshold does not fit.
    """

    def __init__(
        self,
        model: Phi3PreTrainedModel,
        tokenizer: Phi3Tokenizer,
        *,
        task: ClassifierTask | None = None,
        batch_size: int = 64,
        threshold: float | None = None,
    ):
        self.head = Head.from_class(type(model), model.config)
        self.head.check_threshold(threshold)
        self._threshold = threshold
        kind = _task_class(self.head)
        self.task = kind(**_unlabelled(kind)) if task is None else task
        if not isinstance(self.task, kind):
            raise UserError(
                f"a {type(model).__name__} needs a {kind.__name__} as task, got {type(task).__name__}"
            )
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._mesh = model.decoder.mesh
        check_rows(batch_size, 1, self._mesh, "batch_size")
        self._pad_token_id = model.config.pad_token_id
        self._widths = row_widths(self.task.max_length, width_multiple(self._mesh))
        self._compiled = CompiledModel(model)
        self._step = _token_tags if self.head.kind == "token-classification" else _text_logits

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str] | None = None,
        *,
        adapter: str | PathLike[str] | None = None,
        dtype: Any = "bfloat16",
        mesh: Mesh | None = None,
        batch_size: int = 64,
        threshold: float | None = None,
        quantization: Quantization | str | None = None,
        **columns: Any,
    ) -> "Classifier":
        """Loads a classifier that finetune wrote, or any checkpoint whose config.json names one.

        Args:
            name_or_path: of the classifier; with an adapter, of its base model, and None is the one that the
                adapter names.
            adapter: the directory or hub name of the adapter of a classifier, in PEFT's format.
            dtype: dtype of parameters and activations.
            mesh: divides the model.
            threshold: the probability above which one of several labels is chosen; default: 0.5.
            quantization: as in `from_pretrained`.
            columns: as `task_of_model` takes them.

        Raises:
            UserError: the checkpoint is not a classifier, or is broken.
        """
        paths = find_classifier(name_or_path, adapter)
        path = paths.adapter or paths.base
        checkpoint = open_model(paths)
        config = checkpoint.config
        head = Head.from_checkpoint(path, config)
        if not {"score.weight", "classifier.weight"} & set(checkpoint.source.names()):
            raise CheckpointError(f"{path} has no score.weight, so it was never trained to classify")
        tokenizer = checkpoint.source.tokenizer()
        ids = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in ids if token is not None)
        options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "quantization": quantization}
        model = load_merged(head.model, checkpoint, paths.adapter, pad_token_id=pad, **options)
        task = task_of_model(path, config, head, **columns)
        return cls(model, tokenizer, task=task, batch_size=batch_size, threshold=threshold)

    def predict(self, items: Iterable[Text], *, all_scores: bool = False) -> list[dict[str, Any]]:
        """Returns the predictions for texts, pairs, lists of words or rows, in their order.

        Each has `predicted_label` and `score`; `predicted_labels` and `scores`, for several labels or for
        words (None for a word beyond the maximum length); or, for regression, `predicted` or
        `predicted_<output>`.

        Args:
            all_scores: adds the probability of every class, as `score_<label>`.

        Raises:
            BadRowError: an item cannot be read.
            UserError: all scores are requested of a model without classes of whole texts.
        """
        self.head.columns(all_scores)
        rows = [
            Row(self._values(item), Place("the input", number, "row")) for number, item in enumerate(items, 1)
        ]

        def refuse(index: int, error: BadRowError) -> None:
            raise error

        return self.predict_encoded(self.encode(rows, refuse), all_scores=all_scores)

    def _values(self, item: Text) -> dict[str, Any]:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(self.task, TokenClassification):
            return {self.task.words: item if isinstance(item, str) else list(item)}
        if isinstance(item, tuple) and self.task.text_pair is not None:
            return dict(zip((self.task.text, self.task.text_pair), item, strict=True))
        return {self.task.text: item}

    def encode(
        self, items: Iterable[Row | BadRowError], bad: Callable[[int, BadRowError], None]
    ) -> EncodedRows:
        """Tokenises rows; leaves out bad ones, and calls `bad` with the index and error of each.

        An error among the items is that of a row that could not be read.
        """
        good: list[Row] = []

        def examples() -> Iterable[Example]:
            results = encode_items(items, self.task.encoder(self.tokenizer, None), self.tokenizer)
            for index, (row, result) in enumerate(results):
                if isinstance(result, BadRowError):
                    bad(index, result)
                elif isinstance(row, Row):
                    good.append(row)
                    yield from result

        return EncodedRows(good, Examples.gather(examples()))

    def predict_encoded(
        self,
        encoded: EncodedRows,
        *,
        all_scores: bool = False,
        after_batch: Callable[[int], None] = lambda rows: None,
    ) -> list[dict[str, Any]]:
        """Returns the predictions for each row, in their order.

        Args:
            after_batch: called after each batch with the number of rows that are done.

        Raises:
            UserError: the model computes numbers that are not finite.
        """
        examples = encoded.examples
        if not len(examples):
            return []
        plan = BatchPlan(examples.lengths, rows=self.batch_size, widths=self._widths, shuffle=False)
        pad = 0 if self._pad_token_id is None else self._pad_token_id
        predictions: list[Any] = [None] * len(examples)
        done = 0

        def finish(batch: Batch, outputs: Any) -> None:
            nonlocal done
            outputs = jax.device_get(outputs)
            for row, index in enumerate(batch.indices):
                if index >= 0:
                    own = [array[row] for array in outputs]
                    predictions[index] = self._prediction(encoded, int(index), own, all_scores)
                    done += 1
            after_batch(done)

        batches = load(examples, plan, pad_token_id=pad, stop=plan.batches_per_epoch)
        # The device computes one batch while the predictions of the batch before are collected.
        started: tuple[Batch, Any] | None = None
        try:
            for batch in batches:
                arrays = to_devices(batch.arrays, self.batch_size, self._mesh, None)
                outputs = self._compiled(self._step, None, arrays["input_ids"], arrays["attention_mask"])
                if started is not None:
                    finish(*started)
                started = batch, outputs
        finally:
            batches.close()
        assert started is not None
        finish(*started)
        return predictions

    def _prediction(
        self, encoded: EncodedRows, index: int, outputs: list[np.ndarray], all_scores: bool
    ) -> dict[str, Any]:
        row, firsts = encoded.rows[index], encoded.examples.firsts(index)
        positions = slice(None) if firsts is None else np.flatnonzero(firsts)
        numbers = outputs[-1][positions]
        if not np.isfinite(numbers).all():
            raise UserError(
                f"{row.place}: the model's numbers are not finite; a wider dtype (float32) may help, or the "
                "checkpoint is broken"
            )
        if not isinstance(self.task, TokenClassification):
            return self.head.predict_text(numbers, all_scores, self._threshold)
        words = len(row.values[self.task.words])
        return self.head.predict_words(outputs[0][positions], numbers, words, self.tokenizer.truncation_side)


def find_classifier(
    name_or_path: str | PathLike[str] | None, adapter: str | PathLike[str] | None
) -> ModelPaths:
    """Returns the paths of a classifier, and of its adapter if there is one.

    Raises:
        CheckpointError: there is no such model or adapter. UserError: neither is given.
    """

    def refuse() -> Path:
        raise UserError("no model is given; name a classifier (--model) or the adapter of one (--adapter)")

    return find_model(name_or_path, adapter, refuse)


def task_of_model(
    path: Path,
    config: Phi3Config,
    head: Head,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    words_column: str | None = None,
    max_length: int | None = None,
) -> ClassifierTask:
    """Returns the task of a model; what is not given is as in training, if the model has a run.json.

    Raises:
        UserError: run.json is broken, or a column is given that this head does not use.
    """
    for_words = head.kind == "token-classification"
    given = {"text_column": text_column, "text_pair_column": text_pair_column, "words_column": words_column}
    for name in ("text_column", "text_pair_column") if for_words else ("words_column",):
        if given[name] is not None:
            raise UserError(f"{name}={given[name]!r} is not for {head.kind}")
    trained = _training_settings(path)
    columns = {name: trained.get(name) if value is None else value for name, value in given.items()}
    # The classes name these fields differently; a field that nobody set keeps its default.
    fields: dict[str, Any] = {
        "words": columns["words_column"],
        "prefix_space": trained.get("prefix_space"),
    }
    if not for_words:
        fields = {name: columns[f"{name}_column"] for name in ("text", "text_pair")}
        fields["label_separator"] = trained.get("label_separator")
    fields["max_length"] = max_length or trained.get("max_length") or min(512, config.max_position_embeddings)
    kind = _task_class(head)
    return kind(**_unlabelled(kind), **{name: value for name, value in fields.items() if value is not None})


def row_widths(longest: int, multiple: int) -> tuple[int, ...]:
    """Returns a few widths for rows of any file: 16, 24, 32, 48, 64, 96, ... up to `longest`, rounded up."""
    sizes = [longest]
    power = 16
    while power < longest:
        sizes += [power, power * 3 // 2]
        power *= 2
    return tuple(sorted({round_up(min(size, longest), multiple) for size in sizes}))


def _text_logits(model: Any, state: None, input_ids: jax.Array, mask: jax.Array) -> Any:
    return (model(input_ids, mask).logits.astype(jnp.float32),)


def _token_tags(model: Any, state: None, input_ids: jax.Array, mask: jax.Array) -> Any:
    logits = model(input_ids, mask).logits.astype(jnp.float32)
    return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)


def _task_class(head: Head) -> type[ClassifierTask]:
    return TokenClassification if head.kind == "token-classification" else SequenceClassification


def _unlabelled(kind: type[ClassifierTask]) -> dict[str, Any]:
    return {"labels": None} if kind is TokenClassification else {"label": None}


def _training_settings(path: Path) -> dict[str, Any]:
    """Returns the settings of the run that trained the model; none if it has no run.json.

    A run of finetune has its adapters in a folder of its own.
    """
    if path.name == ADAPTER and not (path / RUN).exists():
        path = path.parent
    try:
        return dict(read_json(path / RUN)["settings"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / RUN} is broken ({error!r}); repair or remove it") from error
