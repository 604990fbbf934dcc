"""What long measurements leave behind, and how they go on with it."""

import json

import pytest

from phi3_jax.runs.journal import Journal

ASKED = {"model": "m", "lengths": (1, 2), "seed": 0}


def test_entries_are_there_again(tmp_path):
    path = tmp_path / "new" / "state.json"
    with Journal(path, ASKED) as journal:
        assert journal.chosen("batch", lambda: 4) == 4
        journal.add([{"x": 0.1 + 0.2}])
        journal.add([{"x": float("inf")}, {"x": 1}])
    with Journal(path, ASKED) as journal:
        assert journal.entries == [{"x": 0.1 + 0.2}, {"x": "inf"}, {"x": 1}]
        assert journal.chosen("batch", lambda: 9) == 4
        journal.add([{"x": 2}])
    assert len(json.loads(path.read_text())["entries"]) == 4
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_something_else_is_refused(tmp_path):
    path = tmp_path / "state.json"
    with Journal(path, ASKED) as journal:
        journal.add([1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"lengths: \[1, 2\] -> \[1, 3\]; seed: 0 -> 1") as error:
        Journal(path, {**ASKED, "lengths": [1, 3], "seed": 1}).__enter__()
    assert "--overwrite" in str(error.value)
    assert path.read_bytes() == before
    with Journal(path, {**ASKED, "seed": 1}, overwrite=True) as journal:
        assert journal.entries == []
    with Journal(path, ASKED, overwrite=True) as journal:  # nothing was written meanwhile
        assert journal.entries == [1]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"asked": 1}', '{"asked": 1, "entries": [], "chosen": {}}']
)
def test_broken_ones_are_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is broken"):
        Journal(path, ASKED).__enter__()
    with Journal(path, ASKED, overwrite=True) as journal:
        assert journal.entries == []


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "state.json"
    with Journal(path, ASKED), pytest.raises(ValueError, match="another process is writing"):
        Journal(path, ASKED).__enter__()
    with Journal(path, ASKED):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Journal(tmp_path / "file" / "state.json", ASKED).__enter__()


def test_what_kills_left_goes(tmp_path):
    leftover = tmp_path / ".state.json.123.partial"
    leftover.write_text("{")
    with Journal(tmp_path / "state.json", ASKED) as journal:
        assert journal.entries == []
    assert not leftover.exists()
