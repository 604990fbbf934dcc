"""Stores for the tests of this folder, and a cache folder of their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from stores import KINDS, Store, open_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder for copies of remote files."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PHI3_JAX_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def stores() -> Iterator[Callable[[str], Store]]:
    """Returns a function that finds the store of a kind, which starts when it is first needed."""
    with ExitStack() as stack:
        started: dict[str, Store] = {}

        def find(kind: str) -> Store:
            if kind not in started:
                started[kind] = stack.enter_context(open_store(kind))
            return started[kind].empty_folder()

        yield find


SERVERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]]
"""Kinds of stores whose libraries and servers take seconds to start."""


@pytest.fixture(params=[KINDS[0], *SERVERS])
def store(request: pytest.FixtureRequest, stores: Callable[[str], Store]) -> Store:
    """An empty folder of each kind of store."""
    return stores(request.param)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, stores: Callable[[str], Store]) -> Store:
    """An empty folder of each kind of store that has a server."""
    return stores(request.param)


@pytest.fixture
def memory(stores: Callable[[str], Store]) -> Store:
    """An empty folder of a store in memory."""
    return stores("memory")
