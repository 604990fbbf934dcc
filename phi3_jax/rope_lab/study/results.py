"""The results of a study, as `results.json` has them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class StudyRope(NamedTuple):
    """A rope of a study."""

    name: str
    rope: str
    """The value of `--rope`."""
    kind: str
    mixed: bool
    factors: list[float]
    """On plain rope's wavelengths, by pair, at the study's length."""
    attention_factor: float


class PerplexityRow(NamedTuple):
    """The perplexity of the test part under a rope at a length."""

    rope: str
    trained: str
    length: int
    perplexity: float
    tokens: int


class RetrievalRow(NamedTuple):
    """The answers to a retrieval task under a rope at a length."""

    rope: str
    trained: str
    task: str
    length: int
    right: float
    """The sum of scores, each the share of the right values that an answer has."""
    prompts: int

    @property
    def rate(self) -> float:
        return self.right / self.prompts


class TrainingRow(NamedTuple):
    """A training run: that of the base, with no rope, or one under a rope."""

    rope: str
    trained: str
    steps: int
    seconds: float
    loss: float
    """The mean of the last steps."""
    validation_loss: float


@dataclass(frozen=True)
class StudyResults:
    """All numbers of a study."""

    name: str
    model: str
    original: int
    """The tokens that the base was trained on."""
    length: int
    """The tokens that the ropes stretch it to."""
    ropes: Sequence[StudyRope]
    perplexities: Sequence[PerplexityRow]
    retrievals: Sequence[RetrievalRow]
    trainings: Sequence[TrainingRow]

    def to_dict(self) -> dict[str, Any]:
        """Returns the results for JSON."""
        tables = ("ropes", "perplexities", "retrievals", "trainings")
        return asdict(self) | {name: [row._asdict() for row in getattr(self, name)] for name in tables}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudyResults":
        """Reads what `to_dict` returned.

        Raises:
            KeyError, TypeError: the values are those of something else.
        """

        def rows(name: str, row: type[Any]) -> list[Any]:
            return [row(**each) for each in values[name]]

        return cls(
            name=values["name"],
            model=values["model"],
            original=values["original"],
            length=values["length"],
            ropes=rows("ropes", StudyRope),
            perplexities=[
                row._replace(perplexity=float(row.perplexity)) for row in rows("perplexities", PerplexityRow)
            ],
            retrievals=rows("retrievals", RetrievalRow),
            trainings=rows("trainings", TrainingRow),
        )

    @property
    def lengths(self) -> list[int]:
        """The lengths of the comparison, in ascending order."""
        return sorted({row.length for row in self.perplexities})

    @property
    def trained(self) -> list[str]:
        """How the ropes were trained, in the order of the measurements."""
        return list(dict.fromkeys(row.trained for row in self.perplexities))

    def of_kind(self, kind: str, *, mixed: bool | None = None) -> list[str]:
        """Returns the names of the ropes of a kind."""
        return [
            rope.name for rope in self.ropes if rope.kind == kind and (mixed is None or rope.mixed == mixed)
        ]

    def perplexity(self, rope: str, trained: str, length: int) -> float | None:
        """Returns a perplexity; None if it was not measured."""
        return next(
            (
                row.perplexity
                for row in self.perplexities
                if (row.rope, row.trained, row.length) == (rope, trained, length)
            ),
            None,
        )

    def retrieval_rate(self, rope: str, trained: str, length: int) -> float | None:
        """Returns the share of right answers over all tasks; None if it was not measured."""
        rows = [
            row for row in self.retrievals if (row.rope, row.trained, row.length) == (rope, trained, length)
        ]
        return sum(row.right for row in rows) / sum(row.prompts for row in rows) if rows else None

    def reference(self) -> float | None:
        """Returns the perplexity of the base under plain rope at the longest length up to the original."""
        short = [length for length in self.lengths if length <= self.original]
        values = (
            self.perplexity(name, "none", length) for name in self.of_kind("plain") for length in short[-1:]
        )
        return next((value for value in values if value is not None), None)

    def best(self, ropes: Iterable[str], trained: str, length: int) -> tuple[str, float] | None:
        """Returns the rope with the lowest perplexity, and that; None if none was measured."""
        values = {name: self.perplexity(name, trained, length) for name in ropes}
        measured = {name: value for name, value in values.items() if value is not None}
        return min(measured.items(), key=lambda item: item[1]) if measured else None
