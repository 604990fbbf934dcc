"""The compiled steps of a model: made once for each structure, shared by every call that fits them."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from phi3_jax.cache.cache import KVCache
from phi3_jax.parallel.sharding import replicate, shards

CPU_LOOPS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""XLA's CPU back end would widen all 16-bit weights ahead of a loop and read twice the bytes each step."""

Step = Callable[..., Any]
"""`step(model, state, *arrays, *, static...)`: pure; what must be known to compile it is keyword-only."""


class CompiledModel:
    """A model (or several, as a tuple) taken apart, ready to run compiled steps.

    An abstract one runs nothing, but tells what memory it takes. Programs belong to the structure (classes,
    config, shapes): models that differ in their weights only share them.
    """

    def __init__(self, model: Any):
        self.model = model
        self._leaves, self._structure = jax.tree.flatten(model)
        models = model if isinstance(model, tuple) else (model,)
        self.on_cpu = all(each.on_cpu for each in models)
        self.mesh: Mesh | None = models[0].decoder.mesh
        self._programs: dict[Step, Callable[..., Any]] = {}

    def __call__(self, step: Step, state: Any, *arguments: Any, **static: Any) -> Any:
        """Runs `step`; `state` is donated, so what went in is gone afterwards."""
        if step not in self._programs:
            self._programs[step] = _program(step, self._structure, self.on_cpu, self.mesh)
        return self._programs[step](self._leaves, state, *arguments, **static)

    def rows_for(self, rows: int) -> int:
        """Rows that are computed together where `rows` are wanted: as many as the mesh divides."""
        each = shards(self.mesh, "batch")
        return -(-rows // each) * each


@lru_cache(maxsize=256)
def _program(step: Step, structure: PyTreeDef, on_cpu: bool, mesh: Mesh | None) -> Callable[..., Any]:
    def run(leaves: list[Any], state: Any, *arguments: Any, **static: Any) -> Any:
        made = step(jax.tree.unflatten(structure, leaves), state, *arguments, **static)
        # Caches stay divided; all else is small, and read by the host, in every process.
        return jax.tree.map(
            lambda x: x.constrain(mesh) if isinstance(x, KVCache) else replicate(x, mesh),
            made,
            is_leaf=lambda x: isinstance(x, KVCache),
        )

    parameters = inspect.signature(step).parameters.values()
    return jax.jit(
        run,
        static_argnames=[p.name for p in parameters if p.kind is p.KEYWORD_ONLY],
        donate_argnums=1,
        compiler_options=CPU_LOOPS if on_cpu else None,
    )
