"""The speed of a run: tokens, operations, and their share of the chips' peak."""

import time
from collections.abc import Sequence

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
