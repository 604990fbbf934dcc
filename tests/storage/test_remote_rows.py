"""Classified rows in stores: every row occurs once, in order, and the output appears whole."""

from itertools import count
from typing import Any

import pytest
from store_writes import killed_at
from stores import Store

from phi3_jax.classification import store_output
from phi3_jax.classification.output import OutputState
from phi3_jax.classification.store_output import StoreOutput
from phi3_jax.errors import UserError
from phi3_jax.storage.urls import StorageError, list_entries

OPTIONS = {"model": "m"}
ROWS = b"".join(b"row %d\n" % number for number in range(10))


@pytest.fixture(autouse=True)
def every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is a part."""
    monkeypatch.setattr(store_output, "PART_SECONDS", 0)


def write(url: str, options: dict[str, Any] = OPTIONS, *, overwrite: bool = False, stop: int = 10) -> int:
    """Writes ten rows in chunks of two, or stops before; returns where it resumed."""
    output = StoreOutput(url, options, overwrite)
    resumed = output.state.written
    try:
        while (written := output.state.written) < stop:
            rows = b"".join(b"row %d\n" % number for number in range(written, written + 2))
            output.add(rows, OutputState(written=written + 2))
        if stop == 10:
            output.finish()
    finally:
        output.close()
    return resumed


def names(url: str) -> list[str]:
    return [entry.name for entry in list_entries(url)]


def test_writes_a_file(store: Store) -> None:
    url = f"{store.url}/out.csv"
    assert write(url, stop=6) == 0
    assert names(store.url) == ["out.csv.partial.json"]
    assert names(f"{url}.partial") == ["part-00000", "part-00001", "part-00002"]
    with pytest.raises(UserError, match=r"other options and cannot be resumed: model: 'm' -> 'n'"):
        write(url, {"model": "n"})
    assert write(url) == 6
    assert store.get("out.csv") == ROWS
    assert names(store.url) == ["out.csv"]
    assert names(f"{url}.partial") == []
    with pytest.raises(UserError, match=r"out\.csv already exists; choose another output, or give"):
        write(url)
    assert write(url, {"model": "n"}, overwrite=True) == 0
    assert write(url, overwrite=True, stop=4) == 0
    assert write(url, {"model": "n"}, overwrite=True) == 0
    assert names(store.url) == ["out.csv"]


def test_chunks_wait_for_a_full_part(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{memory.url}/out.csv"
    monkeypatch.setattr(store_output, "PART_SECONDS", 1e9)
    write(url, stop=8)
    assert names(f"{url}.partial") == ["part-00000"]
    monkeypatch.setattr(store_output, "PART_BYTES", 20)
    write(url, overwrite=True, stop=8)
    assert write(url) == 8
    assert memory.get("out.csv") == ROWS


@pytest.mark.parametrize("before", [None, b"before"])
def test_resumes_after_a_kill_at_any_write(memory: Store, before: bytes | None) -> None:
    """A run that was killed after its output was there has nothing left to do."""
    resumed, finished = set(), 0
    for number in count():
        store = memory.empty_folder()
        url, done = f"{store.url}/out.csv", None
        if before is not None:
            store.put("out.csv", before)
        with killed_at(number):
            done = write(url, overwrite=before is not None)
        if done is not None:
            break
        is_there = "out.csv" in names(store.url) and store.get("out.csv") == ROWS
        if is_there or before is not None:
            with pytest.raises(UserError, match="already exists"):
                write(url)
        if not is_there:
            resumed.add(write(url, overwrite=before is not None))
        finished += is_there
        assert store.get("out.csv") == ROWS
        assert names(f"{url}.partial") == []
        assert [name for name in names(store.url) if not name.startswith(".")] == ["out.csv"]
    assert resumed == {0, 2, 4, 6, 8, 10}
    assert finished > 5


@pytest.mark.parametrize("whole", [False, True])
def test_an_earlier_process_ends_when_another_takes_over(store: Store, whole: bool) -> None:
    url = f"{store.url}/out.csv"
    first = StoreOutput(url, OPTIONS, overwrite=False)
    first.add(b"row 0\nrow 1\n", OutputState(written=2))
    if whole:
        write(url)
    else:
        second = StoreOutput(url, OPTIONS, overwrite=False)
    with pytest.raises(UserError, match=r"was taken over by process|and other processes may write there"):
        first.add(b"row 2\nrow 3\n", OutputState(written=4))
    with pytest.raises(UserError):
        first.finish()
    first.close()
    if not whole:
        second.close()
        write(url)
    assert store.get("out.csv") == ROWS


def test_a_part_of_another_process_is_not_replaced(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim does not help between a check and the write after it; here it never does."""
    url = f"{memory.url}/out.csv"
    monkeypatch.setattr(store_output.RunFile, "check_claim", lambda self: None)
    first, second = (StoreOutput(url, OPTIONS, overwrite=False) for _ in range(2))
    first.add(b"row 0\nrow 1\n", OutputState(written=2))
    with pytest.raises(UserError, match=r"part-00000 is of another process; start the command again"):
        second.add(b"row 0\n", OutputState(written=1))
    second.close()
    first.close()
    assert write(url) == 2
    assert memory.get("out.csv") == ROWS


def test_rejects_an_output_that_lacks_a_part(memory: Store) -> None:
    url = f"{memory.url}/out.csv"
    write(url, stop=6)
    memory.remove("out.csv.partial/part-00001")
    with pytest.raises(UserError, match=r"out\.csv\.partial lacks one of its parts; choose another output"):
        write(url)
    memory.remove("out.csv.partial.json")
    with pytest.raises(UserError, match=r"out\.csv\.partial\.json is missing; choose another output"):
        write(url)
    assert write(url, overwrite=True) == 0
    assert memory.get("out.csv") == ROWS


def test_tries_again_when_a_store_fails(server: Store) -> None:
    assert server.proxy is not None
    faults = {3: "503", 6: "cut", 9: "lost", 12: "slow"}
    server.proxy.fault = lambda number, path: faults.get(number)
    write(f"{server.url}/out.csv")
    server.proxy.fault = lambda number, path: None
    assert server.get("out.csv") == ROWS


def test_says_that_a_store_refuses(server: Store) -> None:
    assert server.proxy is not None
    url = f"{server.url}/out.csv"
    output = StoreOutput(url, OPTIONS, overwrite=False)
    server.proxy.fault = lambda number, path: "403"
    with pytest.raises(StorageError, match="the store refuses access"):
        output.add(b"row 0\n", OutputState(written=1))
    with pytest.raises(StorageError, match="the store refuses access"):
        StoreOutput(url, OPTIONS, overwrite=False)
    server.proxy.fault = lambda number, path: None
    output.close()
    assert write(url) == 0
