"""The result of a batch: counts, tokens and speeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target


@dataclass(frozen=True)
class BatchSummary:
    """The counts and totals of a batch; tokens, seconds and FLOPs are those of this run only."""

    done: int
    """The lines with an answer or an error, including those of earlier runs."""
    total: int | None
    """The lines of the input; None: not yet known."""
    errors: int
    resumed: int
    """The lines of earlier runs."""
    seconds: float
    prompt_tokens: int
    """The tokens of the answered prompts."""
    computed_prompt_tokens: int
    """The prompt tokens that were computed; a shared prefix is computed once."""
    completion_tokens: int
    busy: int
    """The slots that have a prompt."""
    slots: int
    flops: float
    """The model's FLOPs for the answers."""
    peak_flops_per_second: float | None
    """The peak of all devices; None: not known."""

    @property
    def input_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.seconds, 1e-9)

    @property
    def output_rate(self) -> float:
        """Generated tokens per second."""
        return self.completion_tokens / max(self.seconds, 1e-9)

    @property
    def share_of_peak(self) -> float | None:
        peak = self.peak_flops_per_second
        return None if peak is None else self.flops / max(self.seconds, 1e-9) / peak

    def write(self, target: Target) -> None:
        """Writes the fields, the rates and the share of the peak to a JSON file."""
        values = asdict(self) | {
            "prompt_tokens_per_second": self.input_rate,
            "completion_tokens_per_second": self.output_rate,
            "share_of_peak": self.share_of_peak,
        }
        write_text(target, json.dumps(values, indent=2) + "\n")

    @classmethod
    def combine(cls, parts: Sequence["BatchSummary"]) -> "BatchSummary":
        """Returns the summary of processes that ran at the same time."""
        apart = ("total", "seconds", "peak_flops_per_second")
        names = [each.name for each in fields(cls) if each.name not in apart]
        sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in names}
        peaks = [part.peak_flops_per_second for part in parts if part.peak_flops_per_second is not None]
        return cls(
            **sums,
            total=sums["done"],
            seconds=max(part.seconds for part in parts),
            peak_flops_per_second=sum(peaks) if len(peaks) == len(parts) else None,
        )
