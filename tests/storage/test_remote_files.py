"""Remote files and folders are copied once, and again when they change."""

from pathlib import Path

import pytest
from stores import Store

from phi3_jax.storage import objects
from phi3_jax.storage.fetch import cached_path, display_name, fetch, fetch_files, fetch_folder, remote_files
from phi3_jax.storage.objects import LocalFile, RemoteFile
from phi3_jax.storage.urls import ChangedError, StorageError, find_entry, is_url, list_entries


def test_copies_a_file_once(store: Store) -> None:
    url = store.put("data/train.csv", b"text,label\n")
    path = fetch(url)
    assert path == cached_path(url)
    assert path.read_bytes() == b"text,label\n"
    state = path.stat()
    assert fetch(url).stat().st_ino == state.st_ino
    assert display_name(path) == url
    assert fetch(store.put("data/empty.csv", b"")).read_bytes() == b""


def test_copies_a_changed_file_again(store: Store) -> None:
    url = store.put("a.txt", b"before")
    assert fetch(url).read_bytes() == b"before"
    store.put("a.txt", b"behind")
    assert fetch(url).read_bytes() == b"behind"


def test_copies_again_what_a_killed_process_left(memory: Store) -> None:
    url = memory.put("a.txt", b"text")
    path = fetch(url)
    next(path.parent.glob(".a.txt*")).write_text("{")
    path.write_bytes(b"te")
    assert fetch(url).read_bytes() == b"text"


def test_reads_large_files_in_many_requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "CHUNK", 1000)
    content = bytes(range(256)) * 40 + b"end"
    path = fetch(store.put("large.bin", content))
    assert path.read_bytes() == content


GZ = ["part-10.gz", "part-2.gz", "part-[2].gz"]
FOUND = {
    "part-*.gz": GZ,
    "part-?.gz": ["part-2.gz"],
    "**/part-1.gz": ["inner/part-1.gz"],
    "part-[2].gz": ["part-[2].gz"],
    "": GZ,
    "notes.md": ["notes.md"],
    "none-*": [],
    "none": [],
}
"""The files that a path with this ending names."""


def test_finds_the_files_of_a_pattern_or_a_folder(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    for each in (*GZ, "notes.md", "inner/part-1.gz"):
        store.put(f"data/{each}", each.encode())
        (tmp_path / "data" / each).write_text(each)

    def find(path: str) -> list[str]:
        try:
            paths = fetch_files(path, wanted=lambda name: name.endswith(".gz"))
        except FileNotFoundError:
            return []
        return [path.read_bytes().decode() for path in paths]

    for folder in (tmp_path / "data", f"{store.url}/data"):
        assert {name: find(f"{folder}/{name}") for name in FOUND} == FOUND
    with pytest.raises(FileNotFoundError, match=r"there is no file .*/none-\*"):
        fetch_files(f"{store.url}/data/none-*", wanted=lambda name: True)


def test_copies_the_files_of_a_folder(store: Store) -> None:
    for name in ("part-1.csv", "part-2.csv", "notes.md", "weights.bin", "inner/part-3.csv"):
        store.put(f"data/{name}", name.encode())
    url = f"{store.url}/data/"
    store.put("data/.part-1.csv.phi3-jax-url.json", b"of another cache")
    folder = fetch_folder(
        url, wanted=lambda name: name != "notes.md", remote=lambda name: name == "weights.bin"
    )
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["part-1.csv", "part-2.csv"]
    store.remove("data/part-2.csv")
    store.put("data/part-1.csv", b"new")
    (file,) = remote_files(fetch_folder(url, remote=lambda name: name == "weights.bin")).values()
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["notes.md", "part-1.csv"]
    assert (folder / "part-1.csv").read_bytes() == b"new"
    memory = bytearray(3)
    file.read([(2, memoryview(memory))])
    assert memory == b"igh"
    assert str(file) == f"{store.url}/data/weights.bin"
    assert fetch(f"{store.url}/data") == folder


def test_says_what_does_not_exist(store: Store) -> None:
    store.put("data/train.csv", b"x")
    with pytest.raises(FileNotFoundError, match=f"there is nothing at {store.url}/none"):
        fetch(f"{store.url}/none")
    assert find_entry(f"{store.url}/data") is None
    assert list_entries(f"{store.url}/data/train.csv") == []


def test_rejects_urls_that_nothing_opens() -> None:
    with pytest.raises(StorageError, match="no library opens odd:// URLs; use gs://, s3:// or a path"):
        fetch("odd://bucket/file")
    with pytest.raises(StorageError, match="memory:// names no file; write memory://BUCKET/PATH"):
        fetch("memory://")


def test_names_the_extra_of_an_absent_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(protocol: str, **_: object) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("fsspec.filesystem", absent)
    with pytest.raises(StorageError, match=r"gs:// URLs need another library: pip install 'phi3-jax\[gcs\]'"):
        fetch("gs://bucket/file")


def test_paths_are_not_urls(tmp_path: Path) -> None:
    assert not any(map(is_url, ("gs:/bucket", "/tmp/a", "C:\\a", "org/name", "", "://a", Path("gs://a"))))
    assert all(map(is_url, ("gs://bucket", "S3://a/b", "hf://org/name")))
    assert fetch("plain/path") == Path("plain/path")
    assert fetch(f"file://{tmp_path}/a.txt") == tmp_path / "a.txt"
    assert display_name(tmp_path) == str(tmp_path)


def test_fetches_again_what_changes_meanwhile(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    url = memory.put("a.bin", b"before")
    read = RemoteFile.read
    changes = iter([b"after!", b"longer than before"])

    def change(file: RemoteFile, pieces: list[tuple[int, memoryview]]) -> None:
        read(file, pieces)
        if (content := next(changes, None)) is not None:
            memory.put("a.bin", content)

    monkeypatch.setattr(RemoteFile, "read", change)
    assert fetch(url).read_bytes() == b"longer than before"


def test_gives_up_on_what_always_changes(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    url = memory.put("a.bin", b"0")
    read = RemoteFile.read

    def change(file: RemoteFile, pieces: list[tuple[int, memoryview]]) -> None:
        read(file, pieces)
        memory.put("a.bin", b"1")

    monkeypatch.setattr(RemoteFile, "read", change)
    with pytest.raises(ChangedError, match=r"a\.bin changed while it was read; start again when nothing"):
        fetch(url)
    assert not cached_path(url).exists()


def test_says_that_a_file_was_removed_or_cut(memory: Store) -> None:
    url = memory.put("a.bin", b"0123456789")
    entry = find_entry(url)
    assert entry is not None
    buffer = memoryview(bytearray(8))
    memory.put("a.bin", b"0123")
    with pytest.raises(ChangedError, match="changed while it was read"):
        RemoteFile(entry).read([(0, buffer)])
    memory.remove("a.bin")
    with pytest.raises(ChangedError, match="was removed while it was read"):
        RemoteFile(entry).read([(0, buffer)])


def test_a_local_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123")
    file = LocalFile(path)
    file.check()
    path.write_bytes(b"01234")
    with pytest.raises(ChangedError, match="changed while it was read"):
        file.check()
    path.unlink()
    with pytest.raises(ChangedError):
        file.check()
