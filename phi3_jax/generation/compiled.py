"""Compiled steps of a model: compiled once for each structure and shared by every call that fits."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from phi3_jax.cache.cache import KVCache
from phi3_jax.parallel.sharding import replicate, shards
from phi3_jax.sizes import round_up

CPU_LOOPS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""XLA's CPU back end would else widen all 16-bit weights before a loop and read twice the bytes each step."""

Step = Callable[..., Any]
"""A pure function `step(model, state, *arrays, *, static...)`; its keyword-only arguments are compiled in."""


class CompiledModel:
    """A model (or a tuple of several), flattened and ready to run compiled steps.

    An abstract model runs nothing, but its memory can be computed. Programs belong to the structure (classes,
    config, shapes): models that differ only in their weights share them.
    """

    def __init__(self, model: Any):
        self.model = model
        self._leaves, self._structure = jax.tree.flatten(model)
        models = model if isinstance(model, tuple) else (model,)
        self.on_cpu = all(each.on_cpu for each in models)
        self.mesh: Mesh | None = models[0].decoder.mesh
        self._programs: dict[Step, Callable[..., Any]] = {}

    def __call__(self, step: Step, state: Any, *arguments: Any, **static: Any) -> Any:
        """Runs `step`; `state` is donated, so the caller's copy is gone afterwards."""
        if step not in self._programs:
            self._programs[step] = _program(step, self._structure, self.on_cpu, self.mesh)
        return self._programs[step](self._leaves, state, *arguments, **static)

    def rows_for(self, rows: int) -> int:
        """Returns the least number of rows, not below `rows`, that the mesh divides."""
        return round_up(rows, shards(self.mesh, "batch"))


@lru_cache(maxsize=256)
def _program(step: Step, structure: PyTreeDef, on_cpu: bool, mesh: Mesh | None) -> Callable[..., Any]:
    def run(leaves: list[Any], state: Any, *arguments: Any, **static: Any) -> Any:
        result = step(jax.tree.unflatten(structure, leaves), state, *arguments, **static)
        # Caches stay divided. The rest is small, and the host reads it in every process.
        return jax.tree.map(
            lambda x: x.constrain(mesh) if isinstance(x, KVCache) else replicate(x, mesh),
            result,
            is_leaf=lambda x: isinstance(x, KVCache),
        )

    parameters = inspect.signature(step).parameters.values()
    return jax.jit(
        run,
        static_argnames=[p.name for p in parameters if p.kind is p.KEYWORD_ONLY],
        donate_argnums=1,
        compiler_options=CPU_LOOPS if on_cpu else None,
    )
