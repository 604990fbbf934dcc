"""What a classifier says of a row, by the kind of its head."""

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

_CLASSIFIERS: dict[str, type[Phi3PreTrainedModel]] = {
    cls.__name__: cls for cls in (Phi3ForSequenceClassification, Phi3ForTokenClassification)
}


@dataclass(frozen=True)
class Head:
    """A classifier's class, task and label set."""

    model: type[Phi3PreTrainedModel]
    kind: str
    """A problem type, or "token-classification"."""
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: type[Phi3PreTrainedModel], config: Phi3Config) -> "Head":
        """The head of a model of this class.

        Raises:
            ValueError: two labels have the same name.
        """
        kind = "token-classification"
        if model is Phi3ForSequenceClassification:
            kind = problem_type(config)
        return cls(model, kind, Labels.from_config(config).names)

    @classmethod
    def of_checkpoint(cls, path: Path, config: Phi3Config) -> "Head":
        """The head that the checkpoint's config.json names.

        Raises:
            ValueError: it names no classifier.
        """
        named = config.extra.get("architectures") or []
        for name in named:
            if name in _CLASSIFIERS:
                return cls.of(_CLASSIFIERS[name], config)
        raise UserError(
            f"{path} is no classifier: its config.json has architectures={named!r}, and classify needs "
            f"{' or '.join(_CLASSIFIERS)}; fine-tune it first (phi3-jax finetune)"
        )

    def columns(self, all_scores: bool) -> list[str]:
        """The names of what is said of a row.

        Raises:
            ValueError: all scores are asked for, and there is not one score for each class.
        """
        if all_scores and self.kind in ("regression", "token-classification"):
            raise UserError(f"all_scores is for classes of whole texts, and this model does {self.kind}")
        scores = [f"score_{name}" for name in self.names] if all_scores else []
        if self.kind == "regression":
            return [f"predicted_{name}" for name in self.names] if len(self.names) > 1 else ["predicted"]
        if self.kind == "single_label_classification":
            return ["predicted_label", "score", *scores]
        return ["predicted_labels", "scores", *scores]

    def of_text(self, logits: Float[np.ndarray, " C"], all_scores: bool) -> dict[str, Any]:
        """What the logits of a text say, by the columns' names."""
        if self.kind == "regression":
            return dict(zip(self.columns(all_scores), map(_short, logits), strict=True))
        logits = logits.astype(np.float64)
        if self.kind == "single_label_classification":
            powers = np.exp(logits - logits.max())
            scores = powers / powers.sum()
            best = int(scores.argmax())
            said = [self.names[best], _short(scores[best])]
        else:
            # By tanh, which overflows nowhere.
            scores = (1 + np.tanh(logits / 2)) / 2
            chosen = np.flatnonzero(logits > 0)
            said = [[self.names[index] for index in chosen], [_short(scores[index]) for index in chosen]]
        return dict(
            zip(self.columns(all_scores), said + [_short(x) for x in scores] * all_scores, strict=True)
        )

    def of_words(
        self, tags: Int[np.ndarray, " kept"], scores: Float[np.ndarray, " kept"], words: int, side: str
    ) -> dict[str, Any]:
        """What is said of a text's words; None of those that were cut off on this side."""
        cut = [None] * (words - len(tags))

        def whole(said: Sequence[Any]) -> list[Any]:
            return [*said, *cut] if side == "right" else [*cut, *said]

        labels = whole([self.names[tag] for tag in tags])
        return dict(zip(self.columns(False), (labels, whole([*map(_short, scores)])), strict=True))


def _short(value: Any) -> float:
    """The number with no more digits than float32 needs to be read back."""
    return float(str(np.float32(value)))
