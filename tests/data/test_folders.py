"""The files of rows in a folder, by format and split."""

import json

import pytest

from phi3_jax.data.folders import files_of


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).write_text("text,label\nx,a\n")
        return tmp_path

    return make


def names(path, split="train", **options):
    return [each.name for each in files_of(path, split=split, **options)]


def test_finds_the_files_of_one_format_sorted_by_name(folder):
    path = folder("b.csv", "a.csv.gz", "C.CSV", ".hidden.csv", "README.md", "LICENSE")
    (path / "more.csv").mkdir()
    assert names(path) == ["C.CSV", "a.csv.gz", "b.csv"]
    assert files_of(path / "b.csv", split="test") == [path / "b.csv"]
    assert files_of(path / "none.csv", split="test") == [path / "none.csv"]


def test_the_format_of_mixed_files_must_be_named(folder):
    path = folder("a.csv", "b.jsonl", "c.json")
    with pytest.raises(
        ValueError, match=r"a\.csv and b\.jsonl; give file_format, one of csv, jsonl, or name"
    ):
        names(path)
    assert names(path, file_format="jsonl") == ["b.jsonl", "c.json"]
    with pytest.raises(
        ValueError, match=r"no data at .*: none of the files .* the suffix of the format conll"
    ):
        names(path, file_format="conll")


def test_finds_the_files_of_a_split(folder):
    path = folder(
        *(f"train-{number:05}-of-00003-0a1b.parquet" for number in range(3)),
        *("validation-00000-of-00001.parquet", "dev.parquet", "test_a.parquet", "Test.b.parquet"),
        "unsupervised-00000-of-00001.parquet",
    )
    assert names(path) == [f"train-{number:05}-of-00003-0a1b.parquet" for number in range(3)]
    assert names(path, "validation") == ["dev.parquet", "validation-00000-of-00001.parquet"]
    assert names(path, "test") == ["Test.b.parquet", "test_a.parquet"]


def test_rejects_splits_that_are_not_whole(folder):
    path = folder("train-00000-of-00003.parquet", "train-00002-of-00003.parquet")
    with pytest.raises(ValueError, match="lacks the file train-00001-of-00003"):
        names(path)
    with pytest.raises(ValueError, match="has files of the splits train, and none of test"):
        names(path, "test")
    folder("tested.parquet")
    with pytest.raises(ValueError, match=r"tested\.parquet has no split, and that of train-00000-of-00003"):
        names(path)


def test_a_folder_of_save_to_disk_is_itself(folder):
    path = folder("data.csv")
    (path / "state.json").write_text(json.dumps({}))
    assert files_of(path, split="train") == [path]
