"""Plans a step on absent chips: whether it fits, what it moves and how fast it can be at most."""

from phi3_jax.costs.chips import CHIPS, Chip, Topology, topology
from phi3_jax.costs.work import AbstractStep, Task, Work
from phi3_jax.plan.planning import Plan, mesh_sizes, plan
from phi3_jax.plan.report import render, to_dict

__all__ = [
    "CHIPS",
    "AbstractStep",
    "Chip",
    "Plan",
    "Task",
    "Topology",
    "Work",
    "mesh_sizes",
    "plan",
    "render",
    "to_dict",
    "topology",
]
