"""The stages of a study, each with the options that its content depends on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phi3_jax.rope_lab.study.settings import StudySettings

NEW, BASE, BASE_DATA, DATA = "base/new", "base/trained", "base/data", "data"
"""Folders of a new model, of the model trained from it and its examples, and of those for fine-tuning."""

FREE = frozenset({"lengths", "max_tokens", "stride"})
"""Options of a comparison that may change, since its folder keeps what was measured."""


@dataclass(frozen=True)
class StudyPlan:
    """The stages of a study by the names of their folders.

    The options of a stage contain those of the stages that it follows from.
    """

    settings: StudySettings
    text: Mapping[str, Any]
    """Identifies the text and its parts."""
    model: Mapping[str, Any]
    """Identifies the base model; empty if the study trains it."""

    @property
    def base(self) -> dict[str, Any]:
        """What the base model follows from."""
        settings = self.settings
        if settings.base is None:
            return {"model": self.model}
        return {"base": settings.base.model_dump(mode="json"), "text": self.text, "seed": settings.seed}

    def rope(self, name: str) -> dict[str, Any]:
        """What a rope follows from."""
        settings = self.settings
        rope = settings.ropes[name].model_dump(mode="json", exclude={"trained"})
        rope["mixed"] = settings.ropes[name].is_mixed
        searched = {} if rope["search"] is None else {"text": self.text, "dtype": settings.dtype}
        return {"rope": rope, "length": settings.length, **self.base, **searched}

    @property
    def data(self) -> dict[str, Any]:
        """What the examples for fine-tuning follow from."""
        settings = self.settings
        assert settings.finetune is not None
        finetune = settings.finetune.model_dump(mode="json")
        return {
            "finetune": finetune,
            "length": settings.length,
            "text": self.text,
            "seed": settings.seed,
        } | self.base

    def training(self, name: str, trained: str) -> dict[str, Any]:
        """What a fine-tuned model follows from."""
        return self.data | self.rope(name) | {"trained": trained}

    def measured(self, name: str, trained: str) -> dict[str, Any]:
        """What a measured model follows from."""
        own = self.rope(name) if trained == "none" else self.training(name, trained)
        return own | {"dtype": self.settings.dtype, "text": self.text}

    def runs(self) -> Iterator[tuple[str, str]]:
        """Yields each rope with each of its trainings; those without training first."""
        pairs = [(name, each) for name in self.settings.ropes for each in self.settings.trained_of(name)]
        yield from (pair for pair in pairs if pair[1] == "none")
        yield from (pair for pair in pairs if pair[1] != "none")

    def stages(self) -> dict[str, dict[str, Any]]:
        """Returns the options of all stages, in their order."""
        settings = self.settings
        stages: dict[str, dict[str, Any]] = {}
        if settings.base is not None:
            stages |= {NEW: self.base, BASE: self.base}
        stages |= {f"search/{name}": self.rope(name) for name, rope in settings.ropes.items() if rope.search}
        trainings = [pair for pair in self.runs() if pair[1] != "none"]
        if trainings:
            stages[DATA] = self.data
        stages |= {folder("finetune", *pair): self.training(*pair) for pair in trainings}
        for pair in self.runs():
            measured = self.measured(*pair)
            stages[folder("compare", *pair)] = measured | settings.compare.model_dump(mode="json")
            if settings.retrieve is not None:
                retrieve = settings.retrieve.model_dump(mode="json")
                stages[folder("retrieve", *pair)] = measured | {"retrieve": retrieve}
        return stages


def folder(kind: str, rope: str, trained: str) -> str:
    """Returns the folder of a training or a measurement."""
    return f"{kind}/{rope}-{'untrained' if trained == 'none' else trained}"
