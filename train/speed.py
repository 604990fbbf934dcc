"""The speed of a run: tokens, operations, their share of the chips' peak, and how long the chips wait."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.costs.chips import peak_flops
from phi3_jax.costs.flops import step_flops
from phi3_jax.costs.work import Work

from .settings import Settings


class Speed:
    """Measures the time from one step to the next."""

    def __init__(self, config: Phi3Config, settings: Settings, mesh: Mesh | None):
        self._config, self._settings = config, settings
        self._peak = peak_flops(jax.devices()[:1] if mesh is None else list(mesh.devices.flat))
        self._last: float | None = None

    def pause(self) -> None:
        """Leaves out the time until the next step, which went into other work."""
        self._last = None

    def after_step(self, tokens: int, shapes: Sequence[tuple[int, int]]) -> dict[str, float | None]:
        """Returns the speed of a step that is done; nothing for the first one.

        Tokens a second are without padding, the model's operations with it.

        Args:
            tokens: of the step's examples.
            shapes: rows of each batch, and tokens of a row, padding included.
        """
        now, last = time.perf_counter(), self._last
        self._last = now
        if last is None or now <= last:
            return {}
        rate = sum(self._flops(*shape) for shape in shapes) / (now - last)
        return {
            "tokens_per_second": tokens / (now - last),
            "flops_per_second": rate,
            "mfu": None if self._peak is None else rate / self._peak,
        }

    def _flops(self, rows: int, width: int) -> int:
        settings = self._settings
        work = Work(
            self._config,
            "finetune",
            rows,
            width,
            lora=settings.lora_rank if settings.trained == "lora" else None,
        )
        flops = step_flops(work)
        if settings.trained == "head":
            return flops.layers // 3 + flops.attention // 3
        return flops.layers + flops.attention + (flops.head if settings.task == "causal-lm" else 0)


class InputWait:
    """Measures the share of the time in which the device has nothing to do, because its batch is not ready.

    A thread notes when each step ends, which is the start of that time if the batch comes later. Used in
    `with`, which ends the thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._step_end: Future[float] | None = None
        self._before: float | None = None
        self._waited = self._total = 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Measures the block that gets a batch; the first one, and the first after a pause, do not count."""
        start = time.perf_counter()
        yield
        end, before = time.perf_counter(), self._before
        self._before = end
        if before is None or self._step_end is None:
            return
        self._total += end - before
        if self._step_end.done() and self._step_end.exception() is None:
            self._waited += max(0.0, end - max(start, self._step_end.result()))

    def after_step(self, result: jax.Array) -> None:
        """Takes a result of the step that has just been sent to the device."""

        def end_of_step() -> float:
            result.block_until_ready()
            return time.perf_counter()

        self._step_end = self._pool.submit(end_of_step)

    def pause(self) -> None:
        """Leaves out the time until the next batch, in which the device has other work."""
        self._before = None

    def share(self) -> float | None:
        """Returns the share, 0 to 1, since the last call; None if there was no step."""
        waited, total = self._waited, self._total
        self._waited = self._total = 0.0
        return waited / total if total else None

    def __enter__(self) -> "InputWait":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
