"""Training steps: objectives, optimizers, batches over a mesh."""

from phi3_jax.model.remat import REMAT_POLICIES
from phi3_jax.trainer.objectives import Objective
from phi3_jax.trainer.step import Metrics, Trainer, TrainState

__all__ = ["REMAT_POLICIES", "Metrics", "Objective", "TrainState", "Trainer"]
