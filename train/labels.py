"""The labels of a run's model: their order, and the rows of the base's head that belong to them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phi3_jax.checkpoint.opening import Checkpoint
from phi3_jax.classification.head import Head
from phi3_jax.data.labels import Labels
from phi3_jax.errors import UserError

from .settings import Settings

logger = logging.getLogger(__name__)

HEAD_TENSORS = frozenset({"score.weight", "classifier.weight"})


class BaseHead(NamedTuple):
    """The classification head that a base model has."""

    kind: str
    """A problem type, or "token-classification"."""
    names: tuple[str, ...]

    @property
    def unnamed(self) -> bool:
        """Whether its labels have no names but their numbers, as transformers writes them by default."""
        return all(name == f"LABEL_{number}" for number, name in enumerate(self.names))


def base_head(checkpoint: Checkpoint) -> BaseHead | None:
    """Returns the head of a checkpoint, or None if it is not a trained classifier."""
    source, config = checkpoint
    if not HEAD_TENSORS & set(source.names()):
        return None
    try:
        head = Head.from_checkpoint(source.path, config)
    except UserError:  # config.json names no classifier
        return None
    return BaseHead(head.kind, head.labels)


@dataclass(frozen=True)
class ModelLabels:
    """The labels of the model, in the order of their ids."""

    labels: Labels
    base_rows: tuple[int, ...] | None = None
    """The row of the base's head that each label starts from; None: the head is new."""


def match_labels(labels: Labels, base: BaseHead | None, kind: str, *, ordered: bool) -> ModelLabels:
    """Returns the labels in the order of the base's head, if it has the same names.

    Names decide, and never the number of labels alone. A head without names fits labels that are the numbers
    0, 1, 2, ..., labels in an order that the user gives, and a single output. With other labels, or another
    kind of task, the head is new, and a warning says so.

    Args:
        labels: of the rows, or given.
        base: of the base model.
        kind: the problem type, or "token-classification".
        ordered: whether the order of `labels` is given, so that it stays.
    """
    if base is None:
        return ModelLabels(labels)
    names = labels.names
    if _target(kind) == _target(base.kind):
        one_output = kind == "regression" and len(names) == len(base.names) == 1
        numbers = names == tuple(map(str, range(len(base.names))))
        if one_output or (base.unnamed and len(names) == len(base.names) and (ordered or numbers)):
            return ModelLabels(labels, tuple(range(len(names))))
        if set(names) == set(base.names):
            kept = labels if ordered else Labels(base.names)
            return ModelLabels(kept, tuple(map(base.names.index, kept.names)))
    logger.warning(
        "the base model's head is for %s of %s, and the rows are for %s of %s: the head is new. To start "
        "from the base's head, give its labels in the setting labels",
        *(_described(base.kind), _listed(base.names), _described(kind), _listed(names)),
    )
    return ModelLabels(labels)


def _target(kind: str) -> str:
    """Returns what a head predicts: one class and several classes are the same."""
    return kind if kind in ("regression", "token-classification") else "classes"


def _described(kind: str) -> str:
    return {"regression": "numbers", "token-classification": "tags"}.get(kind, "classes")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def given_labels(settings: Settings) -> Labels | None:
    """Returns the labels that the settings give, in their order.

    Raises:
        UserError: the task has no classes, or columns name them.
    """
    if settings.labels is None:
        return None
    if settings.task == "causal-lm" or settings.problem_type == "regression":
        raise UserError("labels are for classes, and there are none here")
    if not isinstance(settings.label_column, str):
        raise UserError("labels and several label_column: the columns name the labels; leave labels out")
    labels = Labels(tuple(settings.labels))
    if settings.task == "sequence-classification" and len(labels) == 1:
        raise UserError(f"labels={settings.labels}; expected at least two classes")
    return labels
