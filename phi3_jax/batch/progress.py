"""The progress of a batch: a line on standard error, and statistics in a file."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import jax

from phi3_jax.batch.answers import Answer
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.requests import BadRequestError
from phi3_jax.batch.summary import BatchSummary
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.costs.chips import peak_flops
from phi3_jax.costs.flops import step_flops
from phi3_jax.costs.work import Work
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage.targets import Target

STATS_SECONDS = 10
"""The time between two writes of the statistics file."""


class ResultCounts(Protocol):
    """The number of lines and of errors that an output has."""

    @property
    def count(self) -> int: ...

    @property
    def errors(self) -> int: ...


class BatchProgress:
    """Counts answers and tokens, shows a progress bar and keeps the statistics file up to date."""

    def __init__(
        self, engine: Engine, output: ResultCounts, total: int | None, *, show: bool, stats: Target | None
    ):
        self._engine, self._output, self._total, self._stats = engine, output, total, stats
        self._resumed = output.count
        self._start_time: float | None = None
        self._stats_time = time.monotonic()
        self._bar = FileProgress(total, show)
        self._prompt_tokens = self._completion_tokens = 0
        self._flops = 0.0
        mesh = engine.compiled.mesh
        self._peak = peak_flops(jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat))

    def __enter__(self) -> "BatchProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def start_with(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Yields the requests and starts the clock at the first."""
        for request in requests:
            self._start_time = self._start_time or time.monotonic()
            yield request

    def update(self, result: Answer | BadRequestError) -> None:
        """Counts an answer or an error that has been written, and shows the progress."""
        if isinstance(result, Answer):
            self._prompt_tokens += result.prompt_tokens
            self._completion_tokens += result.completion_tokens
            self._flops += _answer_flops(self._engine.compiled.model.config, result)
        summary = self.summary()
        self._show(summary)
        if self._stats is not None and time.monotonic() - self._stats_time >= STATS_SECONDS:
            summary.write(self._stats)
            self._stats_time = time.monotonic()

    def summary(self) -> BatchSummary:
        load = self._engine.load
        return BatchSummary(
            done=self._output.count,
            total=self._total,
            errors=self._output.errors,
            resumed=self._resumed,
            seconds=0.0 if self._start_time is None else time.monotonic() - self._start_time,
            prompt_tokens=self._prompt_tokens,
            computed_prompt_tokens=load.prompt_tokens,
            completion_tokens=self._completion_tokens,
            busy=load.busy,
            slots=load.slots,
            flops=self._flops,
            peak_flops_per_second=self._peak,
        )

    def _show(self, summary: BatchSummary) -> None:
        lines, remaining = f"{summary.done:,}", ""
        if self._total is not None:
            lines += f"/{self._total:,}"
            if new := summary.done - summary.resumed:
                remaining = time_left((self._total - summary.done) * summary.seconds / new)
        text = (
            f"{lines} lines, {summary.input_rate:,.0f} tokens/s in, {summary.output_rate:,.1f} out, "
            f"{summary.busy} of {summary.slots} slots"
        )
        self._bar.update(text, summary.done, remaining)


def _answer_flops(config: Phi3Config, answer: Answer) -> float:
    """Returns the FLOPs of an answer: all tokens through the layers, its own tokens through the head too."""
    tokens = answer.prompt_tokens + answer.completion_tokens
    flops = step_flops(Work(config, "prefill", 1, tokens))
    return flops.layers + flops.attention + answer.completion_tokens * flops.head
