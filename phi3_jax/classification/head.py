"""The predictions of a classifier, by the kind of its head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.data.labels import Labels
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3ForSequenceClassification, Phi3ForTokenClassification, Phi3PreTrainedModel
from phi3_jax.model.losses import problem_type

_CLASSIFIERS: tuple[type[Phi3PreTrainedModel], ...] = (
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
)


@dataclass(frozen=True)
class Head:
    """A classifier's class, kind of task and labels."""

    model: type[Phi3PreTrainedModel]
    kind: str
    """A problem type, or "token-classification"."""
    labels: tuple[str, ...]

    @classmethod
    def from_class(cls, model: type[Phi3PreTrainedModel], config: Phi3Config) -> "Head":
        """Returns the head of a model of this class.

        Raises:
            UserError: two labels have the same name.
        """
        kind = "token-classification"
        if issubclass(model, Phi3ForSequenceClassification):
            kind = problem_type(config)
        return cls(model, kind, Labels.from_config(config).names)

    @classmethod
    def from_checkpoint(cls, path: Path, config: Phi3Config) -> "Head":
        """Returns the head that the checkpoint's config.json names.

        Raises:
            UserError: it does not name a classifier.
        """
        architectures = config.extra.get("architectures") or []
        classifiers = {family.__name__: family for family in (c.for_config(config) for c in _CLASSIFIERS)}
        for name in architectures:
            if name in classifiers:
                return cls.from_class(classifiers[name], config)
        raise UserError(
            f"{path} is not a classifier: its config.json has architectures={architectures!r}, and classify "
            f"needs {' or '.join(classifiers)}; fine-tune it first (phi3-jax finetune)"
        )

    def columns(self, all_scores: bool) -> list[str]:
        """Returns the names of a row's predictions.

        Raises:
            UserError: all scores are requested of a head that does not have one score for each class.
        """
        if all_scores and self.kind in ("regression", "token-classification"):
            raise UserError(f"all_scores is for classes of whole texts, and this model does {self.kind}")
        scores = [f"score_{label}" for label in self.labels] if all_scores else []
        if self.kind == "regression":
            return [f"predicted_{label}" for label in self.labels] if len(self.labels) > 1 else ["predicted"]
        if self.kind == "single_label_classification":
            return ["predicted_label", "score", *scores]
        return ["predicted_labels", "scores", *scores]

    def check_threshold(self, threshold: float | None) -> None:
        """Checks that labels can be chosen by a threshold.

        Raises:
            UserError: the head does not choose several labels, or the threshold is no probability.
        """
        if threshold is None:
            return
        if self.kind != "multi_label_classification":
            raise UserError(f"threshold is for several labels of a text, and this model does {self.kind}")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold={threshold}; expected a probability, from 0 to 1")

    def predict_text(
        self, logits: Float[np.ndarray, " C"], all_scores: bool, threshold: float | None = None
    ) -> dict[str, Any]:
        """Returns the predictions for a text, by column.

        Args:
            threshold: the probability above which one of several labels is chosen; default: 0.5.
        """
        if self.kind == "regression":
            return dict(zip(self.columns(all_scores), map(_shorten, logits), strict=True))
        logits = logits.astype(np.float64)
        if self.kind == "single_label_classification":
            powers = np.exp(logits - logits.max())
            scores = powers / powers.sum()
            best = int(scores.argmax())
            values = [self.labels[best], _shorten(scores[best])]
        else:
            # The sigmoid as a tanh, which never overflows.
            scores = (1 + np.tanh(logits / 2)) / 2
            chosen = np.flatnonzero(scores > (0.5 if threshold is None else threshold))
            values = [[self.labels[i] for i in chosen], [_shorten(scores[i]) for i in chosen]]
        if all_scores:
            values += map(_shorten, scores)
        return dict(zip(self.columns(all_scores), values, strict=True))

    def predict_words(
        self, tags: Int[np.ndarray, " kept"], scores: Float[np.ndarray, " kept"], words: int, side: str
    ) -> dict[str, Any]:
        """Returns the predictions for a text's words, None for those that were cut off on this side."""
        cut = [None] * (words - len(tags))

        def extend(values: Sequence[Any]) -> list[Any]:
            return [*values, *cut] if side == "right" else [*cut, *values]

        labels = extend([self.labels[tag] for tag in tags])
        return dict(zip(self.columns(False), (labels, extend([*map(_shorten, scores)])), strict=True))


def _shorten(value: Any) -> float:
    """Rounds a number to the digits that identify a float32."""
    return float(str(np.float32(value)))
