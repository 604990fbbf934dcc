"""Files that say with which options an output was started."""

import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
from stores import Store

from phi3_jax.batch.record import Record
from phi3_jax.classification.output import PartialOutput
from phi3_jax.errors import UserError
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.resume import RunFile
from phi3_jax.storage.targets import remove
from phi3_jax.storage.urls import StorageError

OPTIONS = {"model": "m", "lengths": (1, 2), "seed": 0, "threshold": float("inf")}


def run_file(path: Path, options: dict[str, Any] = OPTIONS, **arguments: Any) -> RunFile:
    return RunFile(path, "OUTPUT", options, **arguments)


def test_resumes_with_the_same_options(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    run_file(path).write(done=3)
    assert run_file(path).read(lambda values: values["done"]) == 3
    assert run_file(path, overwrite=True).read(lambda values: values["done"]) == 3
    assert run_file(path, OPTIONS | {"seed": 1}, free={"seed"}).read(lambda values: values["done"]) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_rejects_other_options(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    run_file(path).write(done=3)
    other = OPTIONS | {"seed": 1, "rope": "yarn"}
    with pytest.raises(ValueError, match=r"^OUTPUT was started with other options and") as error:
        run_file(path, other).read(dict)
    assert str(error.value).endswith(
        "cannot be resumed: rope: None -> 'yarn'; seed: 0 -> 1. Choose another output, or give --overwrite "
        "to start over"
    )
    assert run_file(path, other, overwrite=True).read(dict) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"asked": 1}', '{"asked": {"model": "m"}}'])
def test_rejects_a_broken_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(content, encoding="latin-1")
    options = {"model": "m"}
    with pytest.raises(ValueError, match=r"state\.json is broken .*; mend it"):
        run_file(path, options, advice="mend it").read(lambda values: values["done"])
    assert run_file(path, options, overwrite=True).read(lambda values: values["done"]) is None
    path.unlink()
    with pytest.raises(ValueError, match=r"state\.json is missing; mend it"):
        run_file(path, options, advice="mend it").read(dict)


def test_lock_keeps_others_out_and_deletes_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".out[1].json.123.phi3-jax-partial").touch()
    (tmp_path / ".other.json.123.phi3-jax-partial").touch()
    first, second = run_file(tmp_path / "out[1].json"), run_file(tmp_path / "out[1].json")
    first.lock()
    with pytest.raises(ValueError, match="another process is writing OUTPUT"):
        second.lock()
    second.release()
    with pytest.raises(ValueError, match="another process"):
        second.lock()
    first.release()
    second.lock()
    second.release()
    assert [file.name for file in tmp_path.iterdir()] == [".other.json.123.phi3-jax-partial"]


def test_resumes_files_of_earlier_versions(tmp_path: Path) -> None:
    """The layouts that `batch`, `classify` and the measurements have always had."""
    asked, asked_now = {"seed": 0, "lengths": [1, 2]}, {"seed": 0, "lengths": (1, 2)}

    output = tmp_path / "answers.jsonl"
    output.write_text("{}\n")
    summary = {"done": 1, "errors": 0}
    state: dict[str, Any] = {"asked": asked, "processes": 2}
    record = tmp_path / "answers.jsonl.run.json"
    record.write_text(json.dumps(state, indent=2))
    assert Record(output, asked_now, 2).open(False) is None
    with pytest.raises(ValueError, match="processes: 2 -> 1"):
        Record(output, asked_now, 1).open(False)
    record.write_text(json.dumps(state | {"finished": summary}))
    assert Record(output, asked_now, 1).open(False) == summary

    (tmp_path / "rows.csv.partial").write_bytes(b"12345")
    about: dict[str, Any] = {"asked": asked}
    about["done"] = {"read": 2, "written": 1, "unusable": 1, "cut": 0, "untagged": 0, "bytes": 4}
    (tmp_path / "rows.csv.partial.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"csv\.partial is of an earlier version, which left bad rows out; "):
        PartialOutput(tmp_path / "rows.csv", asked_now, False)
    about["done"] = {"written": 2, "bad": 1, "cut": 0, "untagged": 0}
    about["done"]["bytes"] = 4
    (tmp_path / "rows.csv.partial.json").write_text(json.dumps(about, indent=2) + "\n")
    partial = PartialOutput(tmp_path / "rows.csv", asked_now, False)
    partial.close()
    assert vars(partial.state) == about["done"]
    assert partial.path.read_bytes() == b"1234"

    entries = {"asked": asked, "chosen": {"rows": 4}, "entries": [{"x": "inf"}]}
    (tmp_path / "state.json").write_text(json.dumps(entries))
    with Journal(tmp_path / "state.json", asked_now) as journal:
        assert journal.decide("rows", lambda: 9) == 4
        assert journal.entries == [{"x": "inf"}]


def test_resumes_in_a_store_with_the_same_options(store: Store) -> None:
    url = f"{store.empty_folder().url}/state.json"
    first = RunFile(url, "OUTPUT", OPTIONS)
    assert not first.exists()
    first.lock()
    first.write(done=3)
    first.release()
    assert RunFile(url, "OUTPUT", OPTIONS).read(lambda values: values["done"]) == 3
    with pytest.raises(UserError, match="with other options"):
        RunFile(url, "OUTPUT", {}).read(dict)
    assert first.exists()
    first.remove()
    first.remove()
    assert not first.exists()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        first.read(dict)


def test_a_journal_resumes_in_a_store(store: Store) -> None:
    url = f"{store.empty_folder().url}/out/state.json"
    with Journal(url, OPTIONS) as journal:
        assert journal.decide("rows", lambda: 4) == 4
        journal.add([{"x": 1}])
        with Journal(url, OPTIONS) as other:  # on another machine, while the first is slow
            assert other.entries == [{"x": 1}]
            other.add([{"x": 2}])
        with pytest.raises(UserError, match=r"out: .*lock is gone, and other processes may write there, too"):
            journal.add([{"x": 3}])
    with Journal(url, OPTIONS) as journal:
        assert (journal.entries, journal.decide("rows", lambda: 9)) == ([{"x": 1}, {"x": 2}], 4)
    with pytest.raises(UserError, match=r"out was started with other options .* seed: 0 -> 1"):
        Journal(url, OPTIONS | {"seed": 1}).__enter__()


def test_a_run_that_was_taken_over_ends_at_its_next_write(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{store.empty_folder().url}/state.json"
    first, second = RunFile(url, "OUTPUT", OPTIONS), RunFile(url, "OUTPUT", OPTIONS)

    def said() -> list[str]:  # not what a server in this process says
        return [each.getMessage() for each in caplog.records if each.name.startswith("phi3_jax")]

    first.lock()
    first.write(done=1)
    assert not said()
    second.lock()
    assert re.fullmatch(
        r"OUTPUT was being written by process \d+ on \S+, since \S+; it ends at its next write if it still "
        "runs",
        said()[0],
    )
    with pytest.raises(UserError, match=r"^OUTPUT was taken over by process \d+ on"):
        first.write(done=2)
    first.release()  # gives nothing back, since the other one has it
    second.write(done=3)
    second.release()
    assert second.read(lambda values: values["done"]) == 3
    third = RunFile(url, "OUTPUT", OPTIONS)
    third.lock()
    assert len(said()) == 1
    remove(f"{url.rpartition('/')[0]}/.state.json.lock")
    with pytest.raises(UserError, match="is gone"):
        third.write(done=4)


def test_a_store_that_fails_does_not_start_a_run_over(monkeypatch: pytest.MonkeyPatch) -> None:
    file = RunFile("memory://bucket/state.json", "OUTPUT", OPTIONS, overwrite=True)

    def fail(*_: object) -> bytes:
        raise ConnectionError("no answer")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail)
    with pytest.raises(StorageError, match="the store gives no answer"):
        file.read(dict)
