"""Reading rows: every format, every fault with its place, and constant memory."""

import gzip
import json
import pickle
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from phi3_jax.data.arrow_rows import read_dataset
from phi3_jax.data.reading import read_rows
from phi3_jax.data.rows import BadRowError, BadRows, Place, Row, TextFormat


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path, **options: Any) -> list[Row]:
    return list(read_rows(path, bad=BadRows(skip=False), **options))


def faults_of(path: Path, **options: Any) -> tuple[list[Row], list[str]]:
    """Returns the good rows, and the messages of the bad ones with the path's name only."""
    bad = BadRows(skip=True)
    rows = list(read_rows(path, bad=bad, **options))
    assert bad.count == len(bad.first)
    return rows, [message.replace(str(path), path.name) for message in bad.first]


def test_places_and_errors_as_text() -> None:
    assert str(Place("train.csv", 3)) == "train.csv, line 3"
    assert str(Place("train.parquet", 3, "row")) == "train.parquet, row 3"
    error = BadRowError(Place("train.csv", 3), "label is empty")
    assert isinstance(error, ValueError)
    assert str(error) == "train.csv, line 3: label is empty"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_raises_or_counts_bad_rows() -> None:
    errors = [BadRowError(Place("a", line), "fault") for line in range(1, 8)]
    with pytest.raises(BadRowError, match="a, line 1: fault"):
        BadRows(skip=False)(errors[0])
    bad = BadRows(skip=True)
    for error in errors:
        bad(error)
    assert bad.count == 7
    assert bad.first == [f"a, line {line}: fault" for line in range(1, 6)]


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_reads_csv_and_tsv(tmp_path: Path, suffix: str, mark: str, end: str) -> None:
    lines = ["text,label", 'plain,"a, b"', '"two', 'lines ""quoted""",c', "", "é😀,d"]
    content = end.join(line.replace(",", mark) for line in lines)
    rows = rows_of(write(tmp_path / f"rows{suffix}", "\ufeff" + content))
    assert [row.values for row in rows] == [
        {"text": "plain", "label": f"a{mark} b"},
        {"text": f'two{end}lines "quoted"', "label": "c"},
        {"text": "é😀", "label": "d"},
    ]
    assert [row.place.line for row in rows] == [2, 3, 6]


def test_names_and_skips_bad_rows_of_csv(tmp_path: Path) -> None:
    content = b'text,label\na,1\n"in\ntwo lines"\nb,2,3\nbyte \xe9,4\n"x"y,5\nc,6\n"open,7\nd,8\n'
    rows, faults = faults_of(write(tmp_path / "rows.csv", content))
    assert [row.values["text"] for row in rows] == ["a", "c"]
    assert [fault.split(":")[0] for fault in faults] == [f"rows.csv, line {n}" for n in (3, 5, 6, 7, 9)]
    for fault, expected in zip(
        faults, ["1 fields", "3 fields", "byte 0xe9 is not valid UTF-8", "quote", "quote"], strict=True
    ):
        assert expected in fault
    with pytest.raises(BadRowError, match=r"rows\.csv, line 3: 1 fields, but the header has 2"):
        rows_of(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is empty"),
        ("text,label\n", "has no rows"),
        ("text,text\na,b\n", "line 1: two columns have the name 'text'"),
        ("text,\na,b\n", "line 1: a column has no name"),
        ("\na,b\n", "line 1: a column has no name"),
        (b"t\xe9xt,label\na,b\n", "line 1: byte 0xe9 is not valid UTF-8"),
    ],
)
def test_rejects_bad_headers(tmp_path: Path, content: str | bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        rows_of(write(tmp_path / "rows.csv", content))
    assert not isinstance(caught.value, BadRowError)
    assert "rows.csv" in str(caught.value)


def test_reads_long_fields(tmp_path: Path) -> None:
    text = "word " * 100_000
    (row,) = rows_of(write(tmp_path / "rows.csv", f"text\n{text}\n"))
    assert row.values["text"] == text


RAW = 'ham\tHe said "go\nspam\t£5 "now\n'.encode("iso-8859-1")


def test_reads_text_as_it_is(tmp_path: Path) -> None:
    """A file of the SMS collection has no header, quotes that are text, and another encoding."""
    path = write(tmp_path / "rows.tsv", RAW)
    form = TextFormat("iso-8859-1", quoting=False, column_names=("label", "text"))
    rows = rows_of(path, columns=("text",), text=form)
    assert [row.values for row in rows] == [
        {"label": "ham", "text": 'He said "go'},
        {"label": "spam", "text": '£5 "now'},
    ]
    assert [row.place.line for row in rows] == [1, 2]
    with pytest.raises(
        BadRowError, match=r"line 2: byte 0xa3 is not valid UTF-8; .*its encoding, such as iso"
    ):
        rows_of(path, text=form._replace(encoding="utf-8"))
    with pytest.raises(BadRowError, match=r"line 1: .*, or turn quoting off"):
        rows_of(write(tmp_path / "quote.tsv", b'"a"b\tc\n'), text=form._replace(quoting=True))
    with pytest.raises(BadRowError, match="line 1: 2 fields, but there are 1 columns"):
        rows_of(path, text=form._replace(column_names=("text",)))
    with pytest.raises(BadRowError, match="byte 0x81 is not valid cp1252; give another encoding"):
        rows_of(write(tmp_path / "odd.tsv", b"a\t\x81\n"), text=form._replace(encoding="cp1252"))
    for encoding, words in (
        ("latin-9999", "is unknown"),
        ("\ud800", "is unknown"),
        ("a\0", "is unknown"),
        ("utf-16", "has line breaks of several bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            read_rows(path, text=TextFormat(encoding), bad=BadRows(skip=True))


def test_reads_jsonl(tmp_path: Path) -> None:
    content = '{"text": "a", "label": 1}\n\n  \n{"text": "b\\n", "label": ["x", null]}'
    for name in ("rows.jsonl", "rows.json"):
        rows = rows_of(write(tmp_path / name, content))
        assert [row.values for row in rows] == [
            {"text": "a", "label": 1},
            {"text": "b\n", "label": ["x", None]},
        ]
        assert [row.place.line for row in rows] == [1, 4]


def test_names_and_skips_bad_rows_of_jsonl(tmp_path: Path) -> None:
    content = b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": ' + b"1" * 5000 + b"}\n"
    rows, faults = faults_of(write(tmp_path / "rows.jsonl", content))
    assert [row.values for row in rows] == [{"a": 1}]
    assert [fault.split(": ")[0] for fault in faults] == [f"rows.jsonl, line {n}" for n in range(2, 7)]
    assert "not valid JSON: Expecting value at column" in faults[0]
    assert "expected a JSON object in each line, got [1]" in faults[1]
    assert "byte 0xff is not valid UTF-8" in faults[2]
    with pytest.raises(ValueError, match="has no rows"):
        rows_of(write(tmp_path / "blank.jsonl", "\n\n"))


def test_reads_parquet(tmp_path: Path) -> None:
    values = [{"text": f"text {n}", "tags": ["a"] * (n % 3), "other": n} for n in range(3000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=700)
    rows = rows_of(path)
    assert [row.values for row in rows] == values
    assert [row.place for row in rows] == [Place(str(path), n, "row") for n in range(1, 3001)]
    assert list(rows_of(path, columns=("text", "tags"))[5].values) == ["text", "tags"]
    assert rows_of(path, columns=("text", "tags"), only_columns=False) == rows
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"text,label\na,b\n"):
        with pytest.raises(ValueError, match=r"cut\.parquet is not a Parquet file, or is truncated"):
            rows_of(write(tmp_path / "cut.parquet", content))


def test_reads_conll(tmp_path: Path) -> None:
    content = "-DOCSTART- -X- O\n\n\nNew NNP B-city\r\nYork NNP I-city\n\t\nby tab\tO\n-DOCSTART-\tO\nend\tO"
    rows = rows_of(write(tmp_path / "rows.conll", content))
    assert [row.values for row in rows] == [
        {"words": ["New", "York"], "labels": ["B-city", "I-city"]},
        {"words": ["by tab", "end"], "labels": ["O", "O"]},
    ]
    assert [row.place.line for row in rows] == [4, 7]


def test_comments_of_conll_are_no_words(tmp_path: Path) -> None:
    """A # with as many fields as the words is a word, and so is one after the first word."""
    content = "# id = 7\n# text = New York\nNew B-city\nYork I-city\n# O\n\n# O\n1 O\n\n# the end of it\n"
    rows = rows_of(write(tmp_path / "rows.conll", content))
    assert [row.values["words"] for row in rows] == [["New", "York", "#"], ["#", "1"]]
    assert [row.place.line for row in rows] == [3, 7]
    tabs = "# newdoc\n# a b\n#\tO\n#tag\tO\n"
    assert rows_of(write(tmp_path / "tabs.conll", tabs))[0].values["words"] == ["#", "#tag"]
    universal = "# text = a\n1\ta\ta\tDET\t_\t_\t0\troot\t_\t_\n"
    (fault,) = faults_of(write(tmp_path / "u.conll", universal))[1]
    assert "u.conll, line 2: the lines have the 10 columns of CoNLL-U" in fault


def test_reads_conll_of_words_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.conll", "# text = New York\nNew\nYork\n\n#\n1\n\na O\nb X\n")
    rows = rows_of(path, columns=("words",))
    assert [row.values for row in rows] == [
        {"words": ["New", "York"]},
        {"words": ["#", "1"]},
        {"words": ["a", "b"], "labels": ["O", "X"]},
    ]
    with pytest.raises(BadRowError, match="line 2: expected a word and its tag"):
        rows_of(path)
    with pytest.raises(BadRowError, match="line 1: expected a word and its tag"):
        rows_of(write(tmp_path / "mixed.conll", "a\nb O\n"), columns=("words",))


FEATURES = {
    "label": {"names": ["ham", "spam"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["O", "B-x"], "_type": "ClassLabel"}, "_type": "List"},
    "old": [{"names": ["O", "B-x"], "_type": "ClassLabel"}],
    "number": {"dtype": "int64", "_type": "Value"},
}


def test_reads_class_names_of_a_parquet_schema(tmp_path: Path) -> None:
    values = [
        {"label": 1, "tags": [0, 1], "old": [1], "number": 1},
        {"label": -1, "tags": [], "old": None, "number": 0},
    ]
    table = pyarrow.Table.from_pylist(values)
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "rows.parquet")
    assert [row.values for row in rows_of(tmp_path / "rows.parquet")] == [
        {"label": "spam", "tags": ["O", "B-x"], "old": ["B-x"], "number": 1},
        {"label": None, "tags": [], "old": None, "number": 0},
    ]
    some = rows_of(tmp_path / "rows.parquet", columns=("label",), optional=("tags", "none"))
    assert list(some[0].values) == ["label", "tags"]


def write_saved(folder: Path, values: list[dict[str, Any]], **state: Any) -> Path:
    """Writes the files of `save_to_disk`."""
    folder.mkdir(parents=True)
    schema = pyarrow.Table.from_pylist(values).schema.with_metadata(
        {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    )
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (values[:1], values[1:]), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))
    saved = {"_data_files": [{"filename": name} for name in names]} | state
    (folder / "state.json").write_text(json.dumps(saved))
    return folder


def test_reads_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    values = [{"text": f"row {number}", "label": number % 2} for number in range(5)]
    folder = write_saved(tmp_path / "sets" / "train", values)
    rows = rows_of(folder)
    assert [row.values["label"] for row in rows] == ["ham", "spam", "ham", "spam", "ham"]
    assert [row.values["text"] for row in rows] == [each["text"] for each in values]
    assert list(rows_of(folder, columns=("text",))[0].values) == ["text"]
    with pytest.raises(ValueError, match="has no column 'body'"):
        rows_of(folder, columns=("body",))
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"holds several splits; name one of them: .*sets/train"):
        read_rows(tmp_path / "sets", bad=BadRows(skip=True))
    indexed = write_saved(tmp_path / "indexed", values, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ValueError, match="call flatten_indices"):
        rows_of(indexed)
    (folder / "data-00001-of-00002.arrow").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is not a data set that save_to_disk wrote, or is broken"):
        rows_of(folder)


def test_names_and_skips_bad_sentences_of_conll(tmp_path: Path) -> None:
    content = b"a O\nb\nc\n\nd O\n\n\tO\n\ne\t\n\nf \xff O\n"
    rows, faults = faults_of(write(tmp_path / "rows.conll", content))
    assert [row.values["words"] for row in rows] == [["d"]]
    assert [fault.split(": ")[0] for fault in faults] == [f"rows.conll, line {n}" for n in (2, 7, 9, 11)]
    assert "expected a word and its tag, separated by a tab or by spaces, got 'b'" in faults[0]
    assert "UTF-8" in faults[3]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.csv", "text\na\n"), ("rows.jsonl", '{"text": "a"}\n'), ("rows.conll", "a O\n")],
)
def test_reads_compressed_files(tmp_path: Path, name: str, content: str) -> None:
    plain = rows_of(write(tmp_path / name, content))
    path = write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
    assert [row.values for row in rows_of(path)] == [row.values for row in plain]
    for broken in (path.read_bytes()[:-9], content.encode()):
        with pytest.raises(ValueError, match=r"\.gz is not a gzip file, or is truncated"):
            rows_of(write(path, broken))


def test_format_is_given_or_follows_from_the_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.annotated", "a\tO\n")
    assert rows_of(path, file_format="conll")[0].values == {"words": ["a"], "labels": ["O"]}
    with pytest.raises(ValueError, match=r"rows\.annotated is not a known format; .* one of 'csv'"):
        rows_of(path)
    with pytest.raises(ValueError, match="file_format='xml' is not known; use one of 'csv'"):
        rows_of(path, file_format="xml")


def test_rejects_missing_files_and_folders(tmp_path: Path) -> None:
    # The call itself raises, before any row is read.
    with pytest.raises(FileNotFoundError, match=r"rows\.csv: no such file"):
        read_rows(tmp_path / "rows.csv", bad=BadRows(skip=True))
    with pytest.raises(FileNotFoundError, match="it is a folder, and none that save_to_disk"):
        read_rows(tmp_path, bad=BadRows(skip=True))


def test_rejects_missing_columns(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"text": "a", "category": "b"}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    write(tmp_path / "rows.csv", "text,category\na,b\n")
    for name in ("rows.csv", "rows.parquet"):
        with pytest.raises(
            ValueError, match="no column 'label'; its columns are 'text', 'category'"
        ) as caught:
            faults_of(tmp_path / name, columns=("text", "label"))
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="no column 'tags'; its columns are 'words', 'labels'"):
        rows_of(write(tmp_path / "rows.conll", "a O\n"), columns=("words", "tags"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "conll"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    count, text = 20_000, "a sentence of some length " * 4

    def lines() -> Iterator[str]:
        if kind == "csv":
            yield "text,label\n"
        for _ in range(count):
            if kind == "csv":
                yield f"{text},b\n"
            elif kind == "jsonl":
                yield json.dumps({"text": text}) + "\n"
            else:
                yield f"{text}\tO\n\n"

    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        table = pyarrow.Table.from_pylist([{"text": text}] * count)
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    else:
        path.write_text("".join(lines()))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path, bad=BadRows(skip=False))) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000  # the texts alone are 2 MB


def test_reads_real_files(shared_data: Callable[..., Path]) -> None:
    for name, count in (("train", 10_003), ("test", 3080)):
        assert len(rows_of(shared_data("banking77", f"{name}.csv"), columns=("text", "category"))) == count
    for name, count in (
        ("wnut17train.conll", 3394),
        ("emerging.dev.conll", 1009),
        ("emerging.test.annotated", 1287),
    ):
        rows = rows_of(shared_data("wnut17", name), file_format="conll")
        assert len(rows) == count
        assert all(len(row.values["words"]) == len(row.values["labels"]) > 0 for row in rows)


class StandInData(list[dict[str, Any]]):
    """Has the parts of a streamed `datasets` data set that are used."""

    features: dict[str, Any]


def test_reads_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"names": ["no", "yes"], "_type": "ClassLabel"}
    features = {"text": {"_type": "Value"}, "label": classes, "tags": {"feature": classes, "_type": "List"}}
    data = StandInData([{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}])
    data.features = SimpleNamespace(to_dict=lambda: features)

    def load_dataset(name: str, *, split: str, streaming: bool) -> StandInData:
        assert (name, split, streaming) == ("some/data", "train", True)
        return data

    stand_in = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)  # type: ignore[arg-type]
    rows = list(read_dataset("some/data", "train"))
    assert rows[0].values == {"text": "a", "label": "yes", "tags": ["no", "yes"]}
    assert rows[1].values == {"text": "b", "label": None, "tags": []}
    assert str(rows[1].place) == "some/data, train, row 2"


def test_names_the_library_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        next(read_dataset("some/data", "train"))


def test_names_a_data_set_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'some/data':\n  no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    message = r"'some/data' cannot be read \(split 'dev'\): Couldn't reach 'some/data': no network"
    with pytest.raises(ValueError, match=message):
        next(read_dataset("some/data", "dev"))
