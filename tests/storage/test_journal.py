"""Journals of long measurements."""

import json

import pytest

from phi3_jax.storage.journal import Journal

OPTIONS = {"model": "m", "lengths": (1, 2), "seed": 0}


def test_resumes_with_its_entries(tmp_path):
    path = tmp_path / "new" / "state.json"
    with Journal(path, OPTIONS) as journal:
        assert journal.decide("batch", lambda: 4) == 4
        journal.add([{"x": 0.1 + 0.2}])
        journal.add([{"x": float("inf")}, {"x": 1}])
    with Journal(path, OPTIONS) as journal:
        assert journal.entries == [{"x": 0.1 + 0.2}, {"x": "inf"}, {"x": 1}]
        assert journal.decide("batch", lambda: 9) == 4
        journal.add([{"x": 2}])
    assert len(json.loads(path.read_text())["entries"]) == 4
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_removes_what_killed_processes_left(tmp_path):
    path = tmp_path / "state.json"
    for name in (".search.png.123.phi3-jax-partial", ".state.json.123.phi3-jax-partial", ".mine.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".model.abcdefgh.phi3-jax-partial").mkdir()
    with Journal(path, OPTIONS) as journal:
        journal.add([1])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".mine.partial", "state.json"]


def test_rejects_other_options(tmp_path):
    path = tmp_path / "state.json"
    with Journal(path, OPTIONS) as journal:
        journal.add([1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"lengths: \[1, 2\] -> \[1, 3\]; seed: 0 -> 1") as error:
        Journal(path, {**OPTIONS, "lengths": [1, 3], "seed": 1}).__enter__()
    assert "--overwrite" in str(error.value)
    assert path.read_bytes() == before
    with Journal(path, {**OPTIONS, "seed": 1}, overwrite=True) as journal:
        assert journal.entries == []
    with Journal(path, OPTIONS, overwrite=True) as journal:  # nothing was written in between
        assert journal.entries == [1]


@pytest.mark.parametrize("content", ["{", '{"asked": {}, "entries": []}'])
def test_rejects_a_broken_file(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is broken"):
        Journal(path, {}).__enter__()
    with Journal(path, {}, overwrite=True) as journal:
        assert journal.entries == []


def test_one_process_has_the_file(tmp_path):
    path = tmp_path / "state.json"
    with Journal(path, OPTIONS), pytest.raises(ValueError, match="another process is writing"):
        Journal(path, OPTIONS).__enter__()
    with Journal(path, OPTIONS):
        pass


def test_creates_its_directory_and_removes_it_empty(tmp_path):
    with Journal(tmp_path / "new" / "state.json", OPTIONS):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Journal(tmp_path / "file" / "state.json", OPTIONS).__enter__()
