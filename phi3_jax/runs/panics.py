"""Panics of libraries that are written in Rust."""

from collections.abc import Iterator
from contextlib import contextmanager

from phi3_jax.errors import UserError


@contextmanager
def panics_as_errors(name: str) -> Iterator[None]:
    """Makes an error of a panic of the `tokenizers` library, which no `except Exception` catches."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name} breaks the library `tokenizers`: {error}") from None
