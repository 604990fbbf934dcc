"""Files that change as a whole, and values for JSON."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.runs.files import check_outputs, replacing, write_text
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


def test_escapes_bytes_of_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "report.md", "é of " + os.fsdecode(b"\xff.txt"))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "é of \\udcff.txt"


def test_an_error_names_the_file(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "report.md") as work:
            work.touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*report.md'"):
        fail()


@pytest.mark.parametrize("link", ["itself", "dots", "symbolic", "hard", "of a folder"])
def test_rejects_outputs_that_are_inputs(tmp_path: Path, link: str) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("text")
    if link == "itself":
        output = source
    elif link == "dots":
        (tmp_path / "folder").mkdir()
        output = tmp_path / "folder" / ".." / "in.txt"
    elif link == "hard":
        output.hardlink_to(source)
    else:
        output.symlink_to(source)
    read = tmp_path if link == "of a folder" else source
    where = "in" if link == "of a folder" else "also"
    with pytest.raises(ValueError, match=rf"^--output .* is {where} --input; choose another --output$"):
        check_outputs({"--output": output}, {"--input": read})


def test_rejects_one_file_for_two_outputs(tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    with pytest.raises(ValueError, match=r"--stats .* is also --output; choose another --stats"):
        check_outputs({"--output": output, "--stats": tmp_path / "." / "out.txt"}, {})


def test_rejects_devices_and_directories(tmp_path: Path) -> None:
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            check_outputs({"--output": path}, {})


@pytest.mark.parametrize("url", ["gs://bucket/out.csv", "memory://out.csv"])
def test_rejects_urls_as_paths(url: str) -> None:
    with pytest.raises(
        ValueError,
        match="is a URL, and a local path is expected; choose one",
    ):
        check_outputs({"--output": Path(url)}, {})


def test_accepts_different_files(tmp_path: Path) -> None:
    (tmp_path / "in.txt").touch()
    (tmp_path / "out.txt").touch()
    outputs = {"--output": tmp_path / "out.txt", "--stats": tmp_path / "new.json", "--json": None}
    check_outputs(outputs, {"--input": tmp_path / "in.txt", "--model": None, "--text": tmp_path / "absent"})


def test_json_value_converts_other_types() -> None:
    given = {
        1: np.float32(0.5),
        "path": Path("a"),
        "list": (math.nan, True, None, np.int64(3)),
        "deep": {"x": -math.inf},
    }
    assert json_value(given) == {"1": 0.5, "path": "a", "list": ["nan", True, None, 3], "deep": {"x": "-inf"}}
