"""How far a file of requests is: a progress line, and statistics in a file."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from phi3_jax.batch.answers import Answer
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.requests import BadRequestError
from phi3_jax.batch.summary import Summary
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.costs.chips import peak_flops
from phi3_jax.costs.flops import step_flops
from phi3_jax.costs.work import Work
from phi3_jax.runs.files import replacing
from phi3_jax.runs.progress import FileProgress, time_left

STATS_SECONDS = 10
"""Between two writings of the statistics."""


class Counted(Protocol):
    """Where answers go, and how many they are."""

    count: int
    errors: int


class Watch:
    """Counts, and tells of it."""

    def __init__(self, engine: Engine, output: Counted, total: int | None, show: bool, stats: Path | None):
        self._engine, self._output, self._total, self._stats = engine, output, total, stats
        self._resumed = output.count
        self._began: float | None = None
        self._bar = FileProgress(total, show)
        self._prompt_tokens = self._completion_tokens = 0
        self._flops = 0.0
        self._written = time.monotonic()
        mesh = engine.compiled.mesh
        self._peak = peak_flops(jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat))

    def __enter__(self) -> "Watch":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def watched(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The requests; the clock starts with the first."""
        for request in requests:
            self._began = self._began or time.monotonic()
            yield request

    def after(self, answer: Answer | BadRequestError) -> None:
        if isinstance(answer, Answer):
            self._prompt_tokens += answer.prompt_tokens
            self._completion_tokens += answer.completion_tokens
            self._flops += _flops(self._engine.compiled.model.config, answer)
        summary = self.summary()
        done = f"{summary.done:,}"
        if self._total is not None:
            done += f"/{self._total:,}"
        told = (
            f"{done} lines, {summary.input_rate:,.0f} tokens/s in, {summary.output_rate:,.1f} out, "
            f"{summary.busy} of {summary.slots} slots"
        )
        left = ""
        fresh = summary.done - summary.resumed
        if self._total is not None and fresh:
            left = time_left((self._total - summary.done) * summary.seconds / fresh)
        self._bar.update(told, summary.done, left)
        if time.monotonic() - self._written >= STATS_SECONDS:
            self.write(summary)

    def summary(self) -> Summary:
        load = self._engine.load
        return Summary(
            done=self._output.count,
            total=self._total,
            errors=self._output.errors,
            resumed=self._resumed,
            seconds=0.0 if self._began is None else time.monotonic() - self._began,
            prompt_tokens=self._prompt_tokens,
            computed_prompt_tokens=load.prompt_tokens,
            completion_tokens=self._completion_tokens,
            busy=load.busy,
            slots=load.slots,
            flops=self._flops,
            peak_flops_per_second=self._peak,
        )

    def write(self, summary: Summary) -> None:
        """Puts the summary where the user wants it."""
        self._written = time.monotonic()
        if self._stats is None:
            return
        with replacing(self._stats) as work:
            work.write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")


def _flops(config: Phi3Config, answer: Answer) -> float:
    """Of one answer: each token once through the layers, those of the answer through the head as well."""
    tokens = answer.prompt_tokens + answer.completion_tokens
    flops = step_flops(Work(config, "prefill", 1, tokens))
    return flops.layers + flops.attention + answer.completion_tokens * flops.head
