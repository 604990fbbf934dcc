"""Files of a directory change together: after an error, a kill or a power cut, all are old or all new."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from phi3_jax.errors import CheckpointError
from phi3_jax.runs import exchange
from phi3_jax.runs.exchange import exchanging, restore

REPLACED = re.compile(r"model.*\.bin|template")
OLD = {"config": "old", "model-1.bin": "old", "model-2.bin": "old", "template": "old", "notes": "a user's"}
NEW = {"config": "new", "model-1.bin": "new", "words": "new"}
AFTER = NEW | {"notes": "a user's"}


def write(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)


def read(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def exchange_files(target: Path, files: dict[str, str] = NEW) -> None:
    with exchanging(target, config="config", replaced=REPLACED) as work:
        for name, text in files.items():
            (work / name).write_text(text)


def test_replaces_all_files_and_keeps_those_of_the_user(tmp_path: Path) -> None:
    write(tmp_path / "target", OLD)
    exchange_files(tmp_path / "target")
    assert read(tmp_path / "target") == AFTER
    exchange_files(tmp_path / "other")
    assert read(tmp_path / "other") == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]


SCRIPT = """
import os, re, signal, sys
from pathlib import Path
from phi3_jax.runs.exchange import exchanging, restore

operations = 0

def count(event, arguments):
    global operations
    if event in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod"):
        operations += 1
        if operations == last:
            os.kill(os.getpid(), signal.SIGKILL)

target = Path(sys.argv[1])
for line in sys.stdin:
    last = int(line.split()[1])
    child = os.fork()
    if child == 0:
        sys.addaudithook(count)
        if line.startswith("restore"):
            restore(target)
        else:
            with exchanging(target, config="config", replaced=re.compile(r"model.*\\.bin|template")) as work:
                for name in ("config", "model-1.bin", "words"):
                    (work / name).write_text("new")
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def run_and_kill(tmp_path: Path) -> Callable[[str, int], bool]:
    """Returns a function that runs an exchange or `restore` up to an operation; whether it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "target")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(action: str, operation: int) -> bool:
        stdin.write(f"{action} {operation}\n")
        stdin.flush()
        status = int(stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status != 0

    with process:
        yield run
        stdin.close()


def visible(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.name[0] != "."}


def test_killed_at_any_operation(tmp_path: Path, run_and_kill: Callable[[str, int], bool]) -> None:
    target = tmp_path / "target"
    operation, ends = 0, []
    killed = True
    while killed:
        operation += 1
        write(target, OLD)
        killed = run_and_kill("exchange", operation)
        found = visible(target)
        assert "config" not in found or found in (OLD, AFTER)
        restore(target)
        assert visible(target) in (OLD, AFTER)
        ends.append(visible(target) == AFTER)
        exchange_files(target)
        assert read(target) == AFTER  # nothing hidden is left
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
    assert ends == sorted(ends)
    assert ends.count(False) > 20


def test_restoring_may_be_killed_too(tmp_path: Path, run_and_kill: Callable[[str, int], bool]) -> None:
    target = tmp_path / "target"
    write(target, OLD)
    operation = 0
    # Until only the new config is still to arrive.
    while "config" in visible(target) or len(visible(target)) < len(AFTER) - 1:
        if (target / "config").exists():
            restore(target)
        operation += 1
        assert run_and_kill("exchange", operation)
    for step in range(1, 40):
        if not run_and_kill("restore", step):
            break
        found = visible(target)
        assert "config" not in found or found == OLD
    else:
        pytest.fail("it does not end")
    assert visible(target) == OLD
    exchange_files(target)
    assert read(target) == AFTER


def test_killed_before_the_directory_exists(tmp_path: Path, run_and_kill: Callable[[str, int], bool]) -> None:
    target = tmp_path / "target"
    operation = 0
    while not target.exists():
        operation += 1
        assert run_and_kill("exchange", operation)
    assert visible(target) == NEW
    assert operation > 8
    target.rename(tmp_path / "moved")
    exchange_files(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "target"]


def test_files_are_on_the_disk_before_they_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write(target, OLD)
    replace, sync = os.replace, exchange.sync
    synced: list[str] = []
    moved: list[str] = []

    def record(path: Path) -> None:
        synced.append(path.name)
        sync(path)

    def move(path: Path, to: Path) -> None:
        if not moved:
            assert {*NEW, "exchange.json.phi3-jax-partial", "target"} <= set(synced)
            synced.clear()
        moved.append(path.name)
        replace(path, to)

    monkeypatch.setattr(exchange, "sync", record)
    monkeypatch.setattr(os, "replace", move)
    exchange_files(target)
    assert len(moved) == 4 + len(NEW)
    assert "target" in synced


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    target = tmp_path / "target"
    write(target, OLD)
    replace, calls = os.replace, []

    def fail(path: Path, to: Path) -> None:
        calls.append(path)
        if len(calls) == at:
            raise error
        replace(path, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        exchange_files(target)
    assert read(target) == OLD


def test_an_error_of_any_sync_says_which_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = exchange.sync
    ends = []
    for at in range(1, 100):
        target = tmp_path / f"target-{at}"
        write(target, OLD)
        calls: list[Path] = []

        def fail(path: Path, at: int = at, calls: list[Path] = calls) -> None:
            calls.append(path)
            if len(calls) == at:
                raise OSError(5, "Input/output error")
            sync(path)

        with monkeypatch.context() as patched:
            patched.setattr(exchange, "sync", fail)
            message = ""
            try:
                exchange_files(target)
            except CheckpointError as error:
                message = str(error)
        if not message:
            break
        assert "Input/output error" in message
        ends.append("nothing was changed" in message)
        assert visible(target) == (OLD if ends[-1] else AFTER)
        assert ends[-1] or "has its new files" in message
        exchange_files(target)
        assert read(target) == AFTER
    assert ends == [True] * (len(ends) - 1) + [False]
    assert len(ends) > 6


def test_old_files_that_cannot_be_put_back_are_put_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write(target, OLD)
    replace, calls = os.replace, []

    def fail_later(path: Path, to: Path) -> None:
        calls.append(path)
        if len(calls) > 5:
            raise OSError(5, "Input/output error")
        replace(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail_later)
        with pytest.raises(CheckpointError, match=r"its old files cannot be put back .*; they are in "):
            exchange_files(target)
        with pytest.raises(CheckpointError, match="holds half of a checkpoint, since a process was killed"):
            restore(target)
    restore(target)
    assert read(target) == OLD


def test_one_process_writes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    for _ in range(2):  # a new directory, then one that exists
        with exchanging(target, config="config", replaced=REPLACED) as work:
            (work / "config").write_text("first")
            with pytest.raises(CheckpointError, match=f"another process is writing {target}"):
                exchange_files(target)
    assert read(target) == {"config": "first"}
    (target / ".exchange.abcdefgh.phi3-jax-replaced").mkdir()
    (target / ".exchange.abcdefgh.phi3-jax-replaced" / "exchange.json").write_text(
        '{"config": "config", "new": ["config"], "old": []}'
    )
    monkeypatch.setattr(exchange, "_WAIT_SECONDS", 0.01)
    with (
        FileLock(target / ".exchange.phi3-jax-lock"),
        pytest.raises(CheckpointError, match="another process"),
    ):
        restore(target)  # the exchange is not ours to undo
    assert (target / "config").exists()
    restore(target)
    assert read(target) == {}


def test_leaves_hidden_files_of_others(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, OLD)
    (target / ".mine.phi3-jax-partial").mkdir()
    (tmp_path / ".other.abcdefgh.phi3-jax-partial").mkdir()
    exchange_files(target)
    exchange_files(tmp_path / "new")
    assert (target / ".mine.phi3-jax-partial").is_dir()
    assert (tmp_path / ".other.abcdefgh.phi3-jax-partial").is_dir()
