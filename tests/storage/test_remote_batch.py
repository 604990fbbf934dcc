"""`phi3-jax batch` with files in stores: many inputs, and answers that are written once, whatever happens."""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from marks import slow
from small_checkpoint import write_checkpoint
from store_writes import killed_at
from stores import Store
from typer.testing import CliRunner

from phi3_jax import Phi3Config
from phi3_jax.batch import store_record
from phi3_jax.batch.answers import Answer
from phi3_jax.batch.continuous import Load
from phi3_jax.batch.requests import BadRequestError, Request
from phi3_jax.batch.run import batch_file
from phi3_jax.batch.summary import BatchSummary
from phi3_jax.cli import batch
from phi3_jax.errors import UserError
from phi3_jax.storage.claims import Claim
from phi3_jax.storage.urls import StorageError, list_entries

LINES = 7
"""The lines of the input; the last two are errors."""

OPTIONS = {"model": "m"}


class Answerer:
    """Answers with the prompt's letters in capitals; stands for `Engine`.

    Args:
        meanwhile: called before each answer with its number.
    """

    def __init__(self, meanwhile: Callable[[int], None] = lambda number: None):
        config = Phi3Config(num_hidden_layers=1)
        self.compiled = SimpleNamespace(mesh=None, model=SimpleNamespace(config=config))
        self.load = Load(0, 8, 0)
        self._meanwhile = meanwhile

    def run(self, requests: Iterable[Request | BadRequestError]) -> Iterator[Answer | BadRequestError]:
        for number, request in enumerate(list(requests)):
            self._meanwhile(number)
            if isinstance(request, BadRequestError):
                yield request
            else:
                assert request.prompt is not None
                yield Answer(request, request.prompt.upper(), "stop", 1, 1)


def run(
    source: Path, output: str, meanwhile: Callable[[int], None] = lambda number: None, **options: Any
) -> BatchSummary:
    """Answers a file, and writes a part for each answer."""
    given: dict[str, Any] = {"options": OPTIONS, "part_seconds": 0, "show": False}
    engine: Any = Answerer(meanwhile)
    return batch_file(lambda: engine, source, output, **given | options)


def write_requests(path: Path, numbers: Iterable[int] = range(LINES - 2), *, errors: bool = True) -> Path:
    lines = [json.dumps({"id": number, "prompt": f"prompt {number}"}) for number in numbers]
    bad = ["{", lines[0]] if errors else []
    text = "".join(line + "\n" for line in [*lines, *bad]).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_requests(tmp_path / "in.jsonl")


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> list[bytes]:
    """The sorted lines of a local run."""
    run(source, str(tmp_path / "local.jsonl"))
    return sorted((tmp_path / "local.jsonl").read_bytes().splitlines())


def names(url: str) -> list[str]:
    return [entry.name for entry in list_entries(url)]


def answers(store: Store, name: str) -> list[bytes]:
    """Returns the sorted lines of an output, which may be a folder."""
    if not name.endswith("/"):
        return sorted(store.get(name).splitlines())
    parts = [each for each in names(f"{store.url}/{name}") if each.startswith("part-")]
    return sorted(line for each in parts for line in store.get(f"{name}{each}").splitlines())


FORMS = ["out.jsonl", "out/"]
"""A file, and a folder."""

ONE_FAST = ["out.jsonl", slow("out/")]


@pytest.mark.parametrize("name", FORMS)
def test_answers_are_those_of_a_local_run(
    store: Store, source: Path, expected: list[bytes], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{store.url}/{name}"
    summary = run(source, url, stats=f"{store.url}/stats.json")
    assert (summary.done, summary.errors, summary.resumed) == (LINES, 2, 0)
    assert json.loads(store.get("stats.json"))["done"] == LINES
    assert answers(store, name) == expected
    if name == "out/":
        numbered = [f"part-{number:05}.jsonl" for number in range(LINES)]
        assert names(url) == [*numbered, "run.json"]
    else:
        assert names(store.url) == ["out.jsonl", "out.jsonl.run.json", "stats.json"]
        assert names(f"{url}.partial") == []

    assert run(source, url).done == LINES
    assert "is finished; nothing is left to do" in caplog.text
    with pytest.raises(UserError, match=r"was started with other options .* model: 'm' -> 'n'"):
        run(source, url, options={"model": "n"})
    assert answers(store, name) == expected
    source.write_text('{"id": 1, "prompt": "one"}\n')
    run(source, url, options={"model": "n"}, overwrite=True)
    assert [json.loads(line)["text"] for line in answers(store, name)] == ["ONE"]


@pytest.mark.parametrize("name", ONE_FAST)
def test_resumes_after_a_kill_at_any_write(
    memory: Store, source: Path, expected: list[bytes], name: str
) -> None:
    resumed, summary = set(), None
    for write in count():
        store = memory.empty_folder()
        url = f"{store.url}/{name}"
        with killed_at(write):
            summary = run(source, url)
        if summary is not None:
            break
        again = run(source, url)
        assert (again.done, again.errors) == (LINES, 2)
        assert answers(store, name) == expected
        assert names(f"{url}.partial") == []
        resumed.add(again.resumed)
    assert resumed == set(range(LINES + 1))


@pytest.mark.parametrize("name", ONE_FAST)
def test_starts_over_after_a_kill_at_any_write(
    memory: Store, source: Path, expected: list[bytes], name: str, tmp_path: Path
) -> None:
    other = write_requests(tmp_path / "other.jsonl", range(50, 53))
    refused, summary = 0, None
    for write in count():
        store = memory.empty_folder()
        url = f"{store.url}/{name}"
        run(other, url)
        with killed_at(write):
            summary = run(source, url, overwrite=True)
        if summary is not None:
            break
        try:
            run(source, url)
        except UserError:  # before anything of the new output was written
            run(source, url, overwrite=True)
            refused += 1
        assert answers(store, name) == expected
    assert 0 < refused < write / 2


def test_writes_a_part_when_it_is_full_or_old(
    memory: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{memory.url}/out/"
    run(source, url, part_seconds=1e9)
    assert names(url) == ["part-00000.jsonl", "run.json"]
    monkeypatch.setattr(store_record, "PART_BYTES", 200)
    run(source, url, part_seconds=1e9, overwrite=True)
    parts = [name for name in names(url) if name.startswith("part-")]
    assert 1 < len(parts) < LINES


def test_an_interrupted_run_writes_what_it_has(memory: Store, source: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, f"{memory.url}/out/", interrupt, part_seconds=1e9)
    assert len(answers(memory, "out/")) == 3
    assert run(source, f"{memory.url}/out/").resumed == 3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("whole", [False, True])
def test_an_earlier_process_ends_when_another_takes_over(
    memory: Store, source: Path, expected: list[bytes], name: str, whole: bool
) -> None:
    """The other one is started while the first answers, and ends, or is interrupted."""
    url = f"{memory.url}/{name}"

    def interrupt(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    def take_over(number: int) -> None:
        if number == 3 and whole:
            run(source, url)
        elif number == 3:
            with pytest.raises(KeyboardInterrupt):
                run(source, url, interrupt)

    with pytest.raises(UserError, match=r"was taken over by process|and other processes may write there"):
        run(source, url, take_over)
    run(source, url)
    assert answers(memory, name) == expected


def test_processes_that_write_at_a_time_answer_once(
    store: Store, source: Path, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim does not help between a check and the write after it; here it never does."""
    url = f"{store.url}/out/"
    monkeypatch.setattr(Claim, "check", lambda self: None)

    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    def write_too(number: int) -> None:
        if number in (1, 3):
            with pytest.raises(KeyboardInterrupt):
                run(source, url, interrupt)

    summary = run(source, url, write_too, part_seconds=1e9)
    assert summary.done == LINES
    assert answers(store, "out/") == expected


def test_a_file_is_not_made_of_fewer_parts(memory: Store, source: Path) -> None:
    """Another run finished the output, and deleted its parts."""
    url = f"{memory.url}/out.jsonl"

    def remove_part(number: int) -> None:
        if number == 4:
            memory.remove("out.jsonl.partial/part-00001.jsonl")

    with pytest.raises(UserError, match=r"out\.jsonl\.partial lacks parts that were there; start"):
        run(source, url, remove_part)
    assert "out.jsonl" not in names(memory.url)
    assert run(source, url).resumed == LINES - 1
    assert len(answers(memory, "out.jsonl")) == LINES


@pytest.mark.parametrize("name", FORMS)
def test_leaves_an_output_of_others(memory: Store, source: Path, name: str) -> None:
    mine = "out.jsonl" if name == "out.jsonl" else "out/part-00000.jsonl"
    memory.put(mine, b"mine\n")
    with pytest.raises(UserError, match=r"already exists, and there is no .*run\.json with its options"):
        run(source, f"{memory.url}/{name}")
    assert memory.get(mine) == b"mine\n"
    run(source, f"{memory.url}/{name}", overwrite=True)
    assert len(answers(memory, name)) == LINES
    memory.put("out/notes.txt", b"mine")
    memory.put("out/part-00002.jsonl", b"mine\n")
    if name == "out/":
        part = json.loads(memory.get("out/run.json"))
        memory.put("out/run.json", json.dumps({key: part[key] for key in ("asked", "processes")}).encode())
        with pytest.raises(UserError, match=r"part-00002\.jsonl, line 1 is not an answer"):
            run(source, f"{memory.url}/{name}")


def test_tries_again_when_a_store_fails(server: Store, source: Path, expected: list[bytes]) -> None:
    assert server.proxy is not None
    faults = {3: "503", 6: "cut", 9: "lost", 12: "slow"}
    server.proxy.fault = lambda number, path: faults.get(number)
    run(source, f"{server.url}/out/", part_seconds=1e9)
    assert len(server.proxy.requests) > 20
    server.proxy.fault = lambda number, path: None
    assert answers(server, "out/") == expected


def test_says_at_the_start_that_a_store_refuses(server: Store, source: Path) -> None:
    assert server.proxy is not None
    server.proxy.fault = lambda number, path: "403"
    with pytest.raises(StorageError, match="the store refuses access"):
        batch_file(lambda: pytest.fail("made an engine"), source, f"{server.url}/out/", options={})


def test_a_store_that_refuses_later_is_one_line(server: Store, source: Path) -> None:
    assert server.proxy is not None
    proxy = server.proxy

    def refuse(number: int) -> None:
        if number == 2:
            proxy.fault = lambda number, path: "403"

    with pytest.raises(StorageError, match="the store refuses access"):
        run(source, f"{server.url}/out/", refuse)
    proxy.fault = lambda number, path: None
    assert run(source, f"{server.url}/out/").resumed == 2


def test_reads_many_files(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        path = write_requests(
            tmp_path / f"part-{number}.jsonl.gz", [2 * number, 2 * number + 1], errors=False
        )
        store.put(f"in/{path.name}", path.read_bytes())
    store.put("in/part-3.jsonl", b'{"id": 6, "prompt": "six"}\n\n{"id": 1, "prompt": "again"}\n{\n')
    store.put("in/notes.txt", b"mine")
    write_checkpoint(tmp_path)
    common = ["--model", str(tmp_path), "--dtype", "float32", "--max-new-tokens", "2", "--slots", "4"]

    def command(output: str, *inputs: str) -> tuple[int, list[Any]]:
        words = [word for each in inputs for word in ("--input", each)]
        result = CliRunner().invoke(batch.app, [*words, "--output", f"{store.url}/{output}", *common])
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result.exit_code, [json.loads(line) for line in answers(store, output)]

    code, lines = command("a/", f"{store.url}/in/part-*.jsonl*")
    assert code == 3
    assert sorted(line["id"] for line in lines if "text" in line) == list(range(7))
    errors = {line["line"]: (line["file"], line["error"]) for line in lines if "error" in line}
    name = f"{store.url}/in/part-3.jsonl"
    assert errors.keys() == {3, 4}
    message = f"{name}, line 3: an earlier line has the same id 1"
    assert errors[3] == (name, {"code": "duplicate_id", "message": message})
    assert errors[4][1]["message"].startswith(f"{name}, line 4 is not valid JSON")
    record = json.loads(store.get("a/run.json"))
    assert list(record["asked"]["inputs"]) == [entry.url for entry in list_entries(f"{store.url}/in")[1:]]
    assert command("a/", f"{store.url}/in/")[1] == lines


def test_resumes_lines_of_many_files(memory: Store, tmp_path: Path) -> None:
    """Errors have no ids, and lines of several files have the same number."""
    sources = [
        write_requests(tmp_path / name, range(at, at + 2)) for name, at in (("a.jsonl", 0), ("b.jsonl", 2))
    ]
    url = f"{memory.url}/out/"

    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sources, url, interrupt)  # type: ignore[arg-type]
    assert run(sources, url).resumed == 3  # type: ignore[arg-type]
    lines = [json.loads(line) for line in answers(memory, "out/")]
    assert sorted(line["id"] for line in lines if "text" in line) == list(range(4))
    assert sorted((Path(line["file"]).name, line["line"]) for line in lines if "error" in line) == [
        (name, number) for name in ("a.jsonl", "b.jsonl") for number in (3, 4)
    ]
    write_requests(sources[1], range(2, 5))
    with pytest.raises(UserError, match=r"cannot be resumed: inputs\..*b\.jsonl: \["):
        run(sources, url)  # type: ignore[arg-type]


def test_rejects_inputs(memory: Store, source: Path, tmp_path: Path) -> None:
    url = memory.put("in/a.jsonl", source.read_bytes())

    def error(*words: str) -> str:
        result = CliRunner().invoke(batch.app, ["--model", str(tmp_path), *words])
        assert result.exit_code, words
        return f"{result.exception!r}{result.output}"

    write_checkpoint(tmp_path)
    out = ("--output", f"{memory.url}/out.jsonl")
    assert "there is no file" in error("--input", f"{memory.url}/none-*.jsonl", *out)
    assert "there is no file" in error("--input", str(tmp_path / "none-*.jsonl"), *out)
    assert re.search(r"--input .*a\.jsonl is given twice", error("--input", url, "--input", url, *out))
    assert "cannot be read beside files" in error("--input", url, "--input", "-", *out)
    assert re.search(r"--output .*a\.jsonl is also --input", error("--input", url, "--output", url))
    assert re.search(r"--stats .* is also --output", error("--input", url, *out, "--stats", out[1]))
    assert names(memory.url) == []


def test_processes_write_sequences_of_their_own(memory: Store) -> None:
    """Those other than process 0 join its claim, and end with it."""

    def record() -> store_record.StoreRecord:
        return store_record.StoreRecord(f"{memory.url}/out/", OPTIONS, 2, 0)

    first, second = record(), record()
    assert first.open(overwrite=False) is None
    second.join_claim(first.claim_id)
    both = [each.answers(index) for index, each in enumerate((first, second))]
    for id, output in enumerate(both):
        output.add([Answer(Request(1, id, "x", None), "X", "stop", 1, 1)])
    second.release()  # gives nothing back
    both[0].add([Answer(Request(1, 2, "x", None), "X", "stop", 1, 1)])
    parts = [f"part-{name}.jsonl" for name in ("0-of-2-00000", "0-of-2-00001", "1-of-2-00000")]
    assert names(f"{memory.url}/out") == [".run.json.lock", *parts, "run.json"]
    another = record()
    assert another.open(overwrite=False) is None
    with pytest.raises(UserError, match="was taken over by process"):
        both[0].add([Answer(Request(1, 3, "x", None), "X", "stop", 1, 1)])
    again = [another.answers(index) for index in range(2)]
    assert [each.count for each in again] == [2, 1]
    for each in (*both, *again):
        each.close()
    with pytest.raises(UserError, match="processes: 2 -> 1"):
        store_record.StoreRecord(f"{memory.url}/out/", OPTIONS, 1, 0).open(overwrite=False)
