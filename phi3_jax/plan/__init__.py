"""Does a step fit on chips that are not here, what does it move, and how fast can it be at most."""

from phi3_jax.plan.chips import CHIPS, Chip, Topology, topology
from phi3_jax.plan.planning import Plan, plan
from phi3_jax.plan.report import render, to_dict
from phi3_jax.plan.work import AbstractStep, Task, Work

__all__ = [
    "CHIPS",
    "AbstractStep",
    "Chip",
    "Plan",
    "Task",
    "Topology",
    "Work",
    "plan",
    "render",
    "to_dict",
    "topology",
]
