"""Files that change as a whole, and values for JSON."""

import math
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.runs.files import replacing
from phi3_jax.runs.json_values import json_value


def test_replaces_a_whole_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as work:
            work.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "before"
    with replacing(path) as work:
        work.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_json_value_converts_other_types() -> None:
    given = {
        1: np.float32(0.5),
        "path": Path("a"),
        "list": (math.nan, True, None, np.int64(3)),
        "deep": {"x": -math.inf},
    }
    assert json_value(given) == {"1": 0.5, "path": "a", "list": ["nan", True, None, 3], "deep": {"x": "-inf"}}
