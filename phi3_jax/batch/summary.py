"""What came of a file of requests, and how fast."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Summary:
    """What came of a file; speeds are of what this process did."""

    done: int
    """Lines with an answer or an error, those of an earlier run included."""
    total: int | None
    """Lines of the input; None: not known yet."""
    errors: int
    resumed: int
    """Lines that an earlier run did."""
    seconds: float
    prompt_tokens: int
    """Of the answered requests."""
    computed_prompt_tokens: int
    """Without what prompts share, which is computed once."""
    completion_tokens: int
    busy: int
    """Slots that have a prompt."""
    slots: int
    flops: float
    """Of the model, for what was computed."""
    peak_flops_per_second: float | None
    """Of the devices; None: not known."""

    @property
    def input_rate(self) -> float:
        """Tokens of prompts a second."""
        return self.prompt_tokens / max(self.seconds, 1e-9)

    @property
    def output_rate(self) -> float:
        """Tokens made a second."""
        return self.completion_tokens / max(self.seconds, 1e-9)

    @property
    def share_of_peak(self) -> float | None:
        peak = self.peak_flops_per_second
        return None if peak is None else self.flops / max(self.seconds, 1e-9) / peak

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields and what follows from them."""
        rates = {
            "prompt_tokens_per_second": self.input_rate,
            "completion_tokens_per_second": self.output_rate,
        }
        return asdict(self) | rates | {"share_of_peak": self.share_of_peak}

    @classmethod
    def together(cls, parts: Sequence["Summary"]) -> "Summary":
        """Of processes that worked beside each other."""
        totals: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _ADDED}
        peaks = [part.peak_flops_per_second for part in parts if part.peak_flops_per_second is not None]
        return replace(
            parts[0],
            **totals,
            total=totals["done"],
            seconds=max(part.seconds for part in parts),
            peak_flops_per_second=sum(peaks) if len(peaks) == len(parts) else None,
        )


_ADDED = (
    "done",
    "errors",
    "resumed",
    "prompt_tokens",
    "computed_prompt_tokens",
    "completion_tokens",
    "busy",
    "slots",
    "flops",
)
"""Fields of a `Summary` that are sums where there are several processes."""
