"""`phi3-jax batch`: input and output files, resuming after a kill, and errors."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from forks import Fork, Forks
from small_checkpoint import write_checkpoint
from stores import open_store

from phi3_jax import cli
from phi3_jax.batch.run import batch_file
from phi3_jax.cli import common
from phi3_jax.runs import bucket_mounts
from phi3_jax.storage.targets import local_target, read_bytes
from phi3_jax.storage.urls import list_entries

COMMAND = (sys.executable, "-c", "from phi3_jax.cli import main; main()", "batch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compilation cache that all these processes share."""
    return tmp_path_factory.mktemp("cache")


class Batch:
    """Runs the command with the same model, cache and files."""

    def __init__(self, model: Path, cache: Path, folder: Path, command: Any):
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self._model, self._command = model, command
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in the fast tests
            "PHI3_JAX_CACHE": str(cache),
        }

    def start(self, *options: object, **streams: Any) -> "subprocess.Popen[bytes]":
        """Starts the command in a process of its own."""
        return subprocess.Popen(
            [*COMMAND, *self.words(*options)],
            env=self.environment,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
        )

    def __call__(self, *options: object) -> tuple[int, str, str]:
        """Runs the command in this process and returns its exit code, output and errors."""
        return self._command("batch", *self.words(*options))

    def words(self, *options: object) -> list[str]:
        """Returns the options of a command."""
        words = ["--model", self._model, "--dtype", "float32", "--slots", 8, "--max-new-tokens", 6, *options]
        if "--input" not in options:
            words += ["--input", self.source]
        if "--output" not in options:
            words += ["--output", self.output]
        return [*map(str, words)]

    def write(self, count: int, **extra: Any) -> None:
        draws = random.Random(1)
        with self.source.open("w") as file:
            for number in range(count):
                prompt = "abcdefghij"[: draws.randrange(1, 11)]
                file.write(json.dumps({"id": number, "prompt": prompt} | extra) + "\n")

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.output.read_bytes().splitlines()]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Any:
    """Runs `command("batch", ...)` in this process, through the entry point."""
    monkeypatch.setattr(common, "keep_compiled_programs", lambda cache_dir: None)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["phi3-jax", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code, (out, err) = exit_.value.code, capsys.readouterr()
        err += "".join(f"{message}\n" for message in caplog.messages)  # pytest captures them
        caplog.clear()
        return code if isinstance(code, int) else 0, out, err

    return run


@pytest.fixture
def batch(model: Path, cache: Path, tmp_path: Path, command: Any) -> Batch:
    return Batch(model, cache, tmp_path, command)


def test_answers_a_file_once(batch: Batch, tmp_path: Path) -> None:
    batch.write(30)
    code, out, err = batch("--stats", tmp_path / "stats.json")
    assert (code, out) == (0, ""), err
    assert sorted(line["id"] for line in batch.lines()) == list(range(30))
    assert re.search(
        r"30 lines, 0 of them errors; 30 in .* s: 152 tokens of prompts \(152 computed\).* 180 made", err
    ), err
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["done"], stats["total"], stats["errors"], stats["completion_tokens"]) == (30, 30, 0, 180)
    assert stats["slots"] == 8
    assert stats["flops"] > 0

    before = batch.output.read_bytes()
    code, _, err = batch()
    assert (code, "is finished; nothing is left to do" in err) == (0, True)
    assert batch.output.read_bytes() == before
    assert "-> 3; seed: 0 -> 5" in batch("--seed", 5, "--max-new-tokens", 3)[2]
    assert "max_new_tokens: 6 -> 3" in batch("--max-new-tokens", 3)[2]
    with FileLock(batch.output.with_name(".out.jsonl.run.json.lock")):  # as another run has it
        code, _, err = batch("--overwrite")
    assert (code, "another process is writing" in err, batch.output.read_bytes()) == (1, True, before)
    assert batch("--max-new-tokens", 3, "--overwrite")[0] == 0
    assert {line["usage"]["completion_tokens"] for line in batch.lines()} == {3}
    batch.write(31)
    assert "input_size: " in batch("--max-new-tokens", 3)[2]
    assert not list(tmp_path.glob("*partial"))


def test_writes_errors_for_invalid_lines(batch: Batch) -> None:
    batch.write(3)
    with batch.source.open("ab") as file:
        file.write(b'\n{"id": 3, \n{"id": 1, "prompt": "x"}\n{"id": 4, "prompt": "x", "top_p": 2}\n')
    code, _, err = batch()
    assert code == 3, err
    lines = batch.lines()
    assert sorted(line["id"] for line in lines if "text" in line) == [0, 1, 2]
    errors = {line["line"]: (line["id"], line["error"]["code"]) for line in lines if "error" in line}
    assert errors == {5: (None, "invalid_json"), 6: (None, "duplicate_id"), 7: (4, "invalid_option")}
    assert "6 lines, 3 of them errors" in err
    record = batch.output.with_name("out.jsonl.run.json")
    begun = json.loads(record.read_text())
    for finished in (True, False):  # nothing is done again
        if not finished:
            record.write_text(json.dumps({name: begun[name] for name in ("asked", "processes")}))
        assert batch()[0] == 3
        assert len(batch.lines()) == 6


@pytest.mark.slow
def test_reads_compressed_files_and_standard_input(batch: Batch, tmp_path: Path) -> None:
    batch.write(5)
    given = batch.source.read_bytes()
    process = batch.start("--input", "-", "--output", "-", stdin=subprocess.PIPE)
    out, err = process.communicate(given, timeout=300)
    assert process.returncode == 0, err
    streamed = {line["id"]: line["text"] for line in map(json.loads, out.splitlines())}
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(given))
    assert batch("--input", packed)[0] == 0
    assert {line["id"]: line["text"] for line in batch.lines()} == streamed
    assert len(streamed) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
def test_rejects_a_damaged_compressed_input(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(b'{"id": 1, "prompt": "x"}\n' * 20)
    packed = tmp_path / "in.jsonl.gz"
    damaged = {"cut": whole[:-12], "flipped": whole[:20] + bytes(9) + whole[29:], "not compressed": b"{}"}
    packed.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"in\.jsonl\.gz cannot be unpacked"):
        batch_file(lambda: pytest.fail("made an engine"), packed, tmp_path / "out.jsonl", options={})
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl.gz"]


def test_answers_openais_form(batch: Batch) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    batch.source.write_text(json.dumps(line) + "\n" + json.dumps(line | {"custom_id": "b", "url": "/v2"}))
    assert batch()[0] == 3
    responses = {line["custom_id"]: line["response"] for line in batch.lines()}
    assert responses["a"]["body"]["usage"]["completion_tokens"] == 3
    assert responses["b"]["status_code"] == 400


def test_rejects_invalid_files_and_options(batch: Batch, tmp_path: Path) -> None:
    batch.write(2)
    batch.output.write_text("my own\n")
    code, _, err = batch()
    assert code == 1
    assert "out.jsonl already exists, and there is no out.jsonl.run.json with its options" in err
    assert batch.output.read_text() == "my own\n"
    assert "there is no file" in batch("--input", tmp_path / "none.jsonl")[2]
    assert "there is no folder" in batch("--output", tmp_path / "none" / "out.jsonl")[2]
    assert (
        "max_length=9999 must be from 2" in batch("--max-length", 9999, "--output", tmp_path / "b.jsonl")[2]
    )
    assert "top_p=3.0" in batch("--top-p", 3, "--output", tmp_path / "c.jsonl")[2]


def test_refuses_a_mounted_bucket(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"bucket {tmp_path} fuse.gcsfuse rw 0 0\n")
    monkeypatch.setattr(bucket_mounts, "MOUNTS", table)
    batch.write(1)
    code, _, err = batch()
    assert code == 1
    assert "out.jsonl is in a bucket that gcsfuse mounts at" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "mounts"]


def test_answers_many_files(batch: Batch, tmp_path: Path) -> None:
    for name, ids in (("b.jsonl", (1, 2)), ("a.jsonl", (3,))):
        lines = [json.dumps({"id": id, "prompt": "abc"}) + "\n" for id in ids]
        (tmp_path / name).write_text("".join(lines))
    (tmp_path / "c.jsonl").write_text('{"custom_id": "x"}\n{"id": 1, "prompt": "x"}\n')
    code, _, err = batch("--input", tmp_path / "[ab].jsonl", "--input", tmp_path / "c.jsonl")
    assert code == 3, err
    lines = batch.lines()
    assert sorted(line["id"] for line in lines if "text" in line) == [1, 2, 3]
    errors = {line["line"]: line for line in lines if "text" not in line}
    place = str(tmp_path / "c.jsonl")
    assert {line["file"] for line in errors.values()} == {place}
    assert errors[1]["response"]["request_id"] == "req-3-1"
    assert errors[2]["error"]["message"] == f"{place}, line 2: an earlier line has the same id 1"
    asked = json.loads(batch.output.with_name("out.jsonl.run.json").read_text())["asked"]
    assert list(asked["inputs"]) == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    assert len(asked["inputs"][place]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "gs"])
def test_resumes_after_twenty_kills(batch: Batch, kind: str) -> None:
    """The kills come during the start and after any answer, or after any part in a store.

    A run that ends before its kill is compared, and the next one starts a new file.
    """
    batch.write(400, max_new_tokens=40)
    code, _, err = batch("--output", batch.output.with_name("whole.jsonl"))
    assert code == 0, err
    whole = {
        json.loads(line)["id"]: json.loads(line)
        for line in batch.output.with_name("whole.jsonl").read_bytes().splitlines()
    }
    with ExitStack() as stack:
        folder = str(batch.output.parent)
        if kind == "gs":
            folder = stack.enter_context(open_store(kind)).empty_folder().url
            batch.environment = os.environ | batch.environment  # how to find the store, too
        forks = stack.enter_context(Forks(MODULES, batch.output.parent.parent, batch.environment))
        kill_often(batch, forks, folder, whole)


MODULES = ("phi3_jax.cli.batch", "phi3_jax.pipeline", "phi3_jax.generation.engine", "tokenizers", "gcsfs")


def kill_often(batch: Batch, forks: Forks, folder: str, whole: dict[int, Any]) -> None:
    draws, kills, attempts = random.Random(3), 0, 0
    name = "out.jsonl"
    # The store is in this process, and has parts of many answers.
    pause, most = (0.005, 30) if local_target(folder) is not None else (0.2, 6)

    def files() -> dict[str, str]:
        if local_target(folder) is not None:
            return {path.name: str(path) for path in Path(folder).iterdir()}
        return {
            each.name: each.url for each in [*list_entries(folder), *list_entries(f"{folder}/{name}.partial")]
        }

    def count() -> int:
        """Returns the number of answers, of a store that of parts."""
        if local_target(folder) is None:
            return sum(each.startswith("part-") for each in files())
        return read_bytes(f"{folder}/{name}").count(b"\n") if name in files() else 0

    def check() -> None:
        lines = [json.loads(line) for line in read_bytes(f"{folder}/{name}").splitlines()]
        assert sorted(line["id"] for line in lines) == list(range(400))
        assert {line["id"]: line for line in lines} == whole

    def start() -> Fork:
        return forks.start("batch", *batch.words("--output", f"{folder}/{name}", "--part-seconds", 0.1))

    while kills < 20:
        wanted, process = count() + draws.randrange(1, most), start()
        attempts += 1
        try:
            if attempts % 5 == 0:
                time.sleep(draws.uniform(0, 2))
            else:
                while process.poll() is None and count() < wanted:
                    time.sleep(pause)
        finally:
            process.kill()
        text = process.text()
        assert process.returncode in (0, -signal.SIGKILL), text
        if process.returncode == 0:
            check()
            name = f"out-{attempts}.jsonl"
        else:
            kills += 1
    process = start()
    text = process.text()
    assert process.returncode == 0, text
    check()
    assert not [each for each in files() if "part" in each]


@pytest.mark.slow
def test_ten_thousand_lines_with_one_percent_invalid(batch: Batch) -> None:
    invalid = [b'{"id": 1, "prom', b'{"id": 2}\n', b"\xff\xfe", b'{"id": 3, "prompt": "x", "what": 1}', b"[]"]
    with batch.source.open("wb") as file:
        for number in range(10_000):
            line = json.dumps({"id": f"n{number}", "prompt": "abcdefg"[: 1 + number % 7]}).encode()
            file.write((invalid[number // 100 % 5] if number % 100 == 37 else line).strip() + b"\n")
    code, _, err = batch("--max-new-tokens", 2, "--slots", 64)
    assert code == 3, err
    lines = batch.lines()
    answered = [line["id"] for line in lines if "text" in line]
    assert len(answered) == len(set(answered)) == 9900
    errors = [line["line"] for line in lines if "error" in line]
    assert sorted(errors) == list(range(38, 10_001, 100))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_lines(batch: Batch) -> None:
    """Most lines are invalid, so that a quarter of a million take little time."""

    def peak(lines: int) -> int:
        with batch.source.open("w") as file:
            for number in range(lines):
                line = {"id": number, "prompt": "x", "max_new_tokens": 1 if number % 1000 == 0 else 0}
                file.write(json.dumps(line) + "\n")
        process = batch.start("--overwrite", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 3
        assert len(batch.output.read_bytes().splitlines()) == lines
        return used.ru_maxrss

    small, large = peak(2_000), peak(250_000)
    assert large - small < 50_000, (small, large)  # kB
