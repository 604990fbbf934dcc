"""Files that grow are copied to a store, whole, also if it fails for a while."""

import logging
import time
from pathlib import Path

import pytest
from phi3_jax.train import uploads as module
from phi3_jax.train.uploads import Uploads
from stores import Store

from phi3_jax.storage.claims import TakenOverError
from phi3_jax.storage.targets import names_in
from phi3_jax.storage.urls import StorageError


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work" / "inner").mkdir(parents=True)
    return tmp_path / "work"


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Returns a list of errors that the next writes raise; pauses take no time."""
    raised: list[Exception] = []
    write = module.write_bytes

    def write_or_fail(url: str, content: bytes) -> None:
        if raised:
            raise raised.pop(0)
        write(url, content)

    monkeypatch.setattr(module, "write_bytes", write_or_fail)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return raised


def test_copies_what_has_changed(memory: Store, work: Path) -> None:
    checks: list[int] = []
    with Uploads(work, memory.url, lambda: checks.append(1)) as uploads:
        (work / "log").write_text("a")
        (work / "inner" / "events").write_text("b")
        (work / ".hidden").write_text("c")
        uploads.flush()
        uploads.flush()
        (work / "log").write_text("ab")
    assert (memory.get("log"), memory.get("inner/events")) == (b"ab", b"b")
    assert names_in(memory.url) == ["inner", "log"]
    assert len(checks) == 2


def test_copies_at_times_and_warns_once_of_a_reason(
    memory: Store,
    work: Path,
    errors: list[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.001)
    errors += [StorageError("no answer")] * 2
    (work / "log").write_text("a")
    end = time.monotonic() + 10
    with caplog.at_level(logging.WARNING), Uploads(work, memory.url, lambda: None):
        while "log" not in names_in(memory.url):
            assert time.monotonic() < end
    assert caplog.messages == ["the log is not written: no answer; trying again"]


def test_flush_tries_several_times(memory: Store, work: Path, errors: list[Exception]) -> None:
    (work / "log").write_text("a")
    uploads = Uploads(work, memory.url, lambda: None)
    errors += [StorageError(str(number)) for number in range(module.ATTEMPTS)]
    with pytest.raises(StorageError, match=str(module.ATTEMPTS - 1)):
        uploads.flush()
    errors += [StorageError("again")] * (module.ATTEMPTS - 1)
    uploads.flush()
    assert memory.get("log") == b"a"


def test_writes_nothing_that_another_process_took_over(memory: Store, work: Path) -> None:
    def check() -> None:
        raise TakenOverError("taken over")

    (work / "log").write_text("a")
    with pytest.raises(TakenOverError), Uploads(work, memory.url, check):
        pass
    with pytest.raises(ValueError, match="mine"), Uploads(work, memory.url, check):
        raise ValueError("mine")
    assert names_in(memory.url) == []
