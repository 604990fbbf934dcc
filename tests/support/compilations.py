"""Which programs JAX compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled within the block."""
    made: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in event:
            made.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
