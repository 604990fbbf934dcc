"""Fixtures: pairs of models that generate, each made once."""

from collections.abc import Callable

import pytest
from reference import small_config
from twins import CONTEXT, Twins


@pytest.fixture(scope="session")
def twins_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Twins]:
    """Returns `twins_of(**changes)`, which makes a pair of that config."""
    pairs: dict[str, Twins] = {}

    def get(seed: int = 1, **changes: object) -> Twins:
        key = repr((seed, changes))
        if key not in pairs:
            pairs[key] = Twins(small_config(**CONTEXT | changes), tmp_path_factory.mktemp("twins"), seed)
        return pairs[key]

    return get


@pytest.fixture(scope="session")
def twins(twins_of: Callable[..., Twins]) -> Twins:
    """The pair that most tests share: two layers, 4 query heads on 2 of keys, a context of 512."""
    return twins_of()


@pytest.fixture(scope="session")
def shallow(twins_of: Callable[..., Twins]) -> Twins:
    """A pair of one layer, which compiles sooner."""
    return twins_of(num_hidden_layers=1)
