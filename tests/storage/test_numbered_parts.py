"""Parts of an output in a store are created once, by one process."""

import errno
from typing import Any

import fsspec
import pytest
from stores import Store

from phi3_jax.storage import parts as module
from phi3_jax.storage.parts import Parts, create_file
from phi3_jax.storage.urls import StorageError


def test_lists_and_reads_its_parts(store: Store) -> None:
    parts = Parts(f"{store.url}/out/", prefix="part-0-of-2-", suffix=".jsonl")
    assert parts.numbers() == []
    for number in (3, 100_000, 20):
        assert parts.create(number, b"%d" % number)
    for name in ("part-1-of-2-00001.jsonl", "part-0-of-2-00001.txt", "part-0-of-2-x.jsonl"):
        store.put(f"out/{name}", b"another")
    assert parts.numbers() == [3, 20, 100_000]
    assert parts.read(20) == b"20"
    assert store.get("out/part-0-of-2-00003.jsonl") == b"3"


def test_does_not_replace_the_part_of_another_process(store: Store) -> None:
    parts = Parts(f"{store.url}/out")
    assert parts.create(0, b"mine")
    assert not parts.create(0, b"theirs")
    assert parts.create(0, b"mine")
    assert parts.read(0) == b"mine"


def test_the_store_refuses_what_another_process_creates_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw that there is no file before either created it."""
    url = store.put("part", b"theirs")
    monkeypatch.setattr(module, "find_entry", lambda url: None)
    assert not create_file(url, b"mine")
    assert store.get("part") == b"theirs"
    assert create_file(url, b"theirs")


def test_knows_its_own_part_after_a_lost_answer(server: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.proxy is not None
    monkeypatch.setattr(module, "find_entry", lambda url: None)  # so that the first request is the write
    server.proxy.fault = lambda number, path: "lost" if number == 0 else None
    assert create_file(f"{server.url}/part", b"mine")
    assert len(server.proxy.requests) >= 3
    assert server.get("part") == b"mine"


def test_writes_to_stores_that_do_not_know_the_condition(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = type(fsspec.filesystem("memory"))
    write = files.pipe_file

    def pipe_file(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(errno.ENOSYS, "Not implemented")
        write(self, path, value)

    monkeypatch.setattr(files, "pipe_file", pipe_file)
    assert create_file(f"{memory.url}/part", b"mine")
    assert not create_file(f"{memory.url}/part", b"theirs")
    assert memory.get("part") == b"mine"


def test_says_that_a_part_cannot_be_written(server: Store) -> None:
    assert server.proxy is not None
    server.proxy.fault = lambda number, path: "403"
    with pytest.raises(StorageError, match="the store refuses access"):
        create_file(f"{server.url}/part", b"mine")
