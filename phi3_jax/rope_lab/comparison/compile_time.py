"""The time that JAX spends compiling."""

import jax


class CompileTime:
    """Seconds of tracing, lowering and compiling in a block; a context manager."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "CompileTime":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
