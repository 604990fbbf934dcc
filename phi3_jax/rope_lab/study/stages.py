"""Runs the stages of a study, each in its folder, unless it is finished."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.lora import find_model
from phi3_jax.parallel.messages import tell
from phi3_jax.rope_lab.study.record import StudyRecord
from phi3_jax.rope_lab.study.settings import StudySettings
from phi3_jax.storage.fetch import fetch
from phi3_jax.storage.targets import Target, local_target, target_in
from phi3_jax.tokenizer import Phi3Tokenizer

TEXT = "text"
"""The folder of the parts of the text."""


@dataclass(frozen=True)
class StudyStages:
    """The stages of a study, the record of those that are finished, and where they run."""

    settings: StudySettings
    record: StudyRecord
    options: Mapping[str, Mapping[str, Any]]
    """The options of each stage by its name, which is its folder."""
    mesh: Mesh | None
    cache_dir: Path | None
    show: bool

    def run(self, name: str, title: str, work: Callable[[Target], Any]) -> Any:
        """Returns the result of a stage; does its work, in its folder, unless it is finished."""
        options = self.options[name]
        result = self.record.result(name, options)
        if result is None:
            if self.show:
                tell(f"stage {list(self.options).index(name) + 1} of {len(self.options)}: {title}")
            with self.record.working(name, options) as clock:
                clock.result = work(self.folder(name)) or {}
            result = clock.result
        return result

    def folder(self, name: str) -> Target:
        """Returns the path or the URL of a stage's folder; a local one is made."""
        folder = target_in(self.settings.output_dir, name)
        if (local := local_target(folder)) is not None:
            local.mkdir(parents=True, exist_ok=True)
        return folder

    def model(self, name: str) -> Path:
        """Returns the local path of a model that a stage wrote."""
        return find_model(os.fspath(self.folder(name)), None, lambda: default_model(self.cache_dir)).base

    def part(self, name: str) -> Path:
        """Returns the local path of a part of the text: train, validation or test."""
        return fetch(os.fspath(target_in(self.folder(TEXT), f"{name}.txt")))

    def ids(self, name: str, tokenizer: Phi3Tokenizer) -> list[int]:
        """Returns the tokens of a part of the text, without special tokens around it."""
        return tokenizer.encode(self.part(name).read_text(encoding="utf-8"), add_special_tokens=False)
