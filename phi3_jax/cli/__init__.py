"""The command `phi3-jax`."""

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Runs the command; Ctrl-C ends it without a traceback also while its modules are imported."""
    try:
        from phi3_jax.cli.app import app
        from phi3_jax.parallel.messages import run_program
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_program(app)
