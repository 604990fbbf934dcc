"""Commands whose libraries come with an extra of the package."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def train_extra(what: str) -> Iterator[None]:
    """Around imports that need the extra `train`.

    Raises:
        ValueError: a library is absent; the text says what installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what} needs more libraries ({error}); pip install 'phi3-jax[train]'") from error
