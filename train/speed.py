"""The speed of a run: tokens, operations, their share of the chips' peak, and how long the chips wait."""

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

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

    A thread notes when each step ends, which is the start of that time if the batch comes later. The thread
    ends with this object, and never keeps the process from ending.
    """

    def __init__(self) -> None:
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        threading.Thread(target=_note_ends, args=(self._steps,), daemon=True).start()
        weakref.finalize(self, self._steps.put, None)
        self._step: _Step | None = None
        self._before: float | None = None
        self._waited = self._total = 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Measures the block that gets a batch; the first one, and the first after a pause, do not count."""
        start = time.perf_counter()
        yield
        end, before = time.perf_counter(), self._before
        self._before = end
        if before is None or self._step is None:
            return
        self._total += end - before
        if self._step.end is not None:
            self._waited += max(0.0, end - max(start, self._step.end))

    def after_step(self, result: jax.Array) -> None:
        """Takes a result of the step that has just been sent to the device."""
        self._step = _Step(result)
        self._steps.put(self._step)

    def pause(self) -> None:
        """Leaves out the time until the next batch, in which the device has other work."""
        self._before = None

    def share(self) -> float | None:
        """Returns the share, 0 to 1, since the last call; None if there was no step."""
        waited, total = self._waited, self._total
        self._waited = self._total = 0.0
        return waited / total if total else None


@dataclass
class _Step:
    result: jax.Array
    end: float | None = None
    """The time at which it ended; None before."""


def _note_ends(steps: "SimpleQueue[_Step | None]") -> None:
    """Waits for each step, in order, until None comes."""
    while (step := steps.get()) is not None:
        try:
            step.result.block_until_ready()
        except Exception:  # which the run gets where it reads the result
            continue
        step.end = time.perf_counter()
