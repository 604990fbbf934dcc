"""The command `phi3-jax`."""

from phi3_jax.cli.app import main

__all__ = ["main"]
