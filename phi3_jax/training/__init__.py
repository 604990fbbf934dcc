"""Training: one step, compiled once, for any head, on one device or a mesh."""

from phi3_jax.training.step import Metrics, Trainer, TrainState

__all__ = ["Metrics", "TrainState", "Trainer"]
