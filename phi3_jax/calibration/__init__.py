"""Rounding the weights of a checkpoint for the inputs that a text gives them."""

from phi3_jax.calibration.run import CalibrationOptions, calibrate_checkpoint

__all__ = ["CalibrationOptions", "calibrate_checkpoint"]
