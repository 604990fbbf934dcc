"""Marks of tests."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Leaves a case of `parametrize` to the slow run: other cases ask the same of the same code."""
    return pytest.param(*values, marks=pytest.mark.slow)
