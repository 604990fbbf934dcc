"""A fine-tuned classifier: rows in, what it says of each out."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phi3_jax.checkpoint import CheckpointError, open_checkpoint, resolve
from phi3_jax.classification.head import Head
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import Batch, load
from phi3_jax.data.rows import BadRowError, BadRows, Place, Row
from phi3_jax.data.tasks import Example, SequenceClassification, TokenClassification
from phi3_jax.errors import UserError
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.loading import load_model
from phi3_jax.runs.json_values import RUN
from phi3_jax.tokenizer import Phi3Tokenizer
from phi3_jax.trainer.batches import check_rows, to_devices, width_multiple

ClassifierTask = SequenceClassification | TokenClassification
"""How rows are read; labels=None."""

Text = str | tuple[str, str] | Sequence[str] | Mapping[str, Any]
"""A text, a pair of texts, a list of words, or a row with its columns."""


@dataclass(frozen=True)
class Encoded:
    """Rows that can be classified, and the example of each."""

    rows: list[Row]
    examples: Examples


class Classifier:
    """A model with a classification head, and how rows become what it reads.

    Rows are sorted by length into batches of a few widths, each compiled once; what is said of a row depends
    on the batch that it falls in by no more than rounding.

    Args:
        model: a `Phi3ForSequenceClassification` or `Phi3ForTokenClassification`.
        task: columns and longest length; default: that of texts or words of at most 512 tokens.
        batch_size: rows of a batch, over all devices.

    Raises:
        ValueError: a model or task of another kind, rows that do not divide over the model's mesh.
    """

    def __init__(
        self,
        model: Phi3PreTrainedModel,
        tokenizer: Phi3Tokenizer,
        *,
        task: ClassifierTask | None = None,
        batch_size: int = 64,
    ):
        self.head = Head.of(type(model), model.config)
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
        self._step = _tags_of_tokens if self.head.kind == "token-classification" else _logits_of_texts

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        dtype: Any = "bfloat16",
        mesh: Mesh | None = None,
        batch_size: int = 64,
        **columns: Any,
    ) -> "Classifier":
        """The classifier of a run of finetune, or of any checkpoint whose config.json names one.

        Args:
            dtype: of parameters and activations.
            mesh: to divide the model over.
            columns: as `task_of` takes them.

        Raises:
            ValueError: the checkpoint is no classifier, or is broken.
        """
        path = resolve(name_or_path)
        source, config = open_checkpoint(path)
        head = Head.of_checkpoint(path, config)
        if not {"score.weight", "classifier.weight"} & set(source.names()):
            raise CheckpointError(f"{path} has no score.weight, so it has never been trained to classify")
        tokenizer = Phi3Tokenizer.from_pretrained(path)
        ids = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in ids if token is not None)
        model = load_model(head.model, path, dtype=dtype, mesh=mesh, pad_token_id=pad)
        return cls(model, tokenizer, task=task_of(path, config, head, **columns), batch_size=batch_size)

    def predict(self, items: Iterable[Text], *, all_scores: bool = False) -> list[dict[str, Any]]:
        """What is said of each text, pair, list of words or row, in their order.

        Each has `predicted_label` and `score`; `predicted_labels` and `scores` (of several labels or of
        words; None for a word behind the longest length); or `predicted`, `predicted_<output>` of several.

        Args:
            all_scores: the probability of every class too, as `score_<label>`.

        Raises:
            ValueError: an item that cannot be read, as `BadRowError`; all scores of what has no classes.
        """
        self.head.columns(all_scores)
        rows = [
            Row(self._values(item), Place("the input", number, "row")) for number, item in enumerate(items, 1)
        ]
        return self.answers(self.encode(rows, BadRows(skip=False)), all_scores=all_scores)

    def _values(self, item: Text) -> dict[str, Any]:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(self.task, TokenClassification):
            return {self.task.words: item if isinstance(item, str) else list(item)}
        if isinstance(item, tuple) and self.task.text_pair is not None:
            return dict(zip((self.task.text, self.task.text_pair), item, strict=True))
        return {self.task.text: item}

    def encode(self, rows: Iterable[Row], bad: BadRows) -> Encoded:
        """Tokenises rows.

        Raises:
            BadRowError: the first bad row, unless `bad` skips them.
        """
        good: list[Row] = []

        def examples() -> Iterable[Example]:
            for row in rows:
                try:
                    (example,) = self.task.encode(row, self.tokenizer, None)  # type: ignore[arg-type]  # no labels
                except BadRowError as error:
                    bad(error)
                else:
                    good.append(row)
                    yield example

        return Encoded(good, Examples.gather(examples()))

    def answers(
        self,
        encoded: Encoded,
        *,
        all_scores: bool = False,
        classified: Callable[[int], None] = lambda rows: None,
    ) -> list[dict[str, Any]]:
        """What is said of each row, in their order.

        Args:
            classified: is told how many rows of these are done, after each batch.

        Raises:
            ValueError: the model's numbers are not finite.
        """
        examples = encoded.examples
        if not len(examples):
            return []
        plan = BatchPlan(examples.lengths, rows=self.batch_size, widths=self._widths, shuffle=False)
        pad = 0 if self._pad_token_id is None else self._pad_token_id
        found: list[Any] = [None] * len(examples)
        done = 0

        def finish(batch: Batch, said: Any) -> None:
            nonlocal done
            said = jax.device_get(said)
            for row, index in enumerate(batch.indices):
                if index >= 0:
                    found[index] = self._answer(encoded, int(index), [x[row] for x in said], all_scores)
                    done += 1
            classified(done)

        batches = load(examples, plan, pad_token_id=pad, stop=plan.steps_per_epoch)
        # One batch is always on its way to the device while another's numbers are made words.
        started: tuple[Batch, Any] | None = None
        try:
            for batch in batches:
                arrays = to_devices(batch.arrays, self.batch_size, self._mesh, None)
                said = self._compiled(self._step, None, arrays["input_ids"], arrays["attention_mask"])
                if started is not None:
                    finish(*started)
                started = batch, said
        finally:
            batches.close()
        assert started is not None
        finish(*started)
        return found

    def _answer(
        self, encoded: Encoded, index: int, said: list[np.ndarray], all_scores: bool
    ) -> dict[str, Any]:
        row, firsts = encoded.rows[index], encoded.examples.firsts(index)
        where = slice(None) if firsts is None else np.flatnonzero(firsts)
        numbers = said[-1][where]
        if not np.isfinite(numbers).all():
            raise UserError(
                f"{row.place}: the model's numbers are not finite; a wider dtype (float32) may help, or the "
                "checkpoint is broken"
            )
        if not isinstance(self.task, TokenClassification):
            return self.head.of_text(numbers, all_scores)
        words = len(row.values[self.task.words])
        return self.head.of_words(said[0][where], numbers, words, self.tokenizer.truncation_side)


def task_of(
    path: Path,
    config: Phi3Config,
    head: Head,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    words_column: str | None = None,
    max_length: int | None = None,
) -> ClassifierTask:
    """How rows are read: what is not given is as it was in training, where the run's settings lie with the
    model.

    Raises:
        ValueError: the settings are broken, or a column is named that this head has no use for.
    """
    of_words = head.kind == "token-classification"
    given = {"text_column": text_column, "text_pair_column": text_pair_column, "words_column": words_column}
    for name in ("text_column", "text_pair_column") if of_words else ("words_column",):
        if given[name] is not None:
            raise UserError(f"{name}={given[name]!r} is not for {head.kind}")
    trained = _settings(path)
    told = {name: trained.get(name) if value is None else value for name, value in given.items()}
    # A class reads some of them, by other names; what nobody told is its default.
    fields: dict[str, Any] = {"words": told["words_column"]}
    if not of_words:
        fields = {name: told[f"{name}_column"] for name in ("text", "text_pair")}
        fields["label_separator"] = trained.get("label_separator")
    fields["max_length"] = max_length or trained.get("max_length") or min(512, config.max_position_embeddings)
    kind = _task_class(head)
    return kind(**_unlabelled(kind), **{name: value for name, value in fields.items() if value is not None})


def row_widths(longest: int, multiple: int) -> tuple[int, ...]:
    """The few widths that rows of any file have: 16, 24, 32, 48, 64, 96 and so on up to `longest`, as
    multiples."""
    sizes = [longest]
    power = 16
    while power < longest:
        sizes += [power, power * 3 // 2]
        power *= 2
    return tuple(sorted({-(-min(size, longest) // multiple) * multiple for size in sizes}))


def _logits_of_texts(model: Any, state: None, input_ids: jax.Array, mask: jax.Array) -> Any:
    return (model(input_ids, mask).logits.astype(jnp.float32),)


def _tags_of_tokens(model: Any, state: None, input_ids: jax.Array, mask: jax.Array) -> Any:
    logits = model(input_ids, mask).logits.astype(jnp.float32)
    return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)


def _task_class(head: Head) -> type[ClassifierTask]:
    return TokenClassification if head.kind == "token-classification" else SequenceClassification


def _unlabelled(kind: type[ClassifierTask]) -> dict[str, Any]:
    return {"labels": None} if kind is TokenClassification else {"label": None}


def _settings(path: Path) -> dict[str, Any]:
    """The settings of the run that made a model; none, where it is from elsewhere."""
    try:
        return dict(json.loads((path / RUN).read_text(encoding="utf-8"))["settings"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / RUN} is broken ({error!r}); mend or remove it") from error
