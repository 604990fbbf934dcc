"""Answers in both forms, and the file that holds each answer once, also after kills."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.batch import answers as module
from phi3_jax.batch.answered import IdSet
from phi3_jax.batch.answers import Answer, AnswerFile, answer_line, error_line
from phi3_jax.batch.requests import BadRequestError, Request

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
TEXT = "Ünder the \n sea"


def answer(id: str | int, line: int = 1, openai: str | None = None) -> Answer:
    return Answer(request(id, line, openai), TEXT, "stop", 7, 5)


def request(id: str | int, line: int = 1, openai: str | None = None) -> Request:
    return Request(line, id, "Once", None, openai=openai, model="phi-3")


def bad_request(line: int, **options: Any) -> BadRequestError:
    return BadRequestError(line, "invalid_json", f"line {line} is not valid JSON", **options)


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_writes_our_form() -> None:
    line = answer_line(answer(7), created=0)
    assert json.loads(line) == {"id": 7, "text": TEXT, "finish_reason": "stop", "usage": USAGE}
    assert line.count(b"\n") == 1
    error = {"code": "invalid_json", "message": "line 3 is not valid JSON"}
    assert json.loads(error_line(bad_request(3))) == {"id": None, "line": 3, "error": error}


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_writes_openais_form(url: str) -> None:
    line = json.loads(answer_line(answer("a", 4, url), created=99))
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("a", None, 200)
    body = line["response"]["body"]
    assert (body["usage"], body["created"], body["model"]) == (USAGE, 99, "phi-3")
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    message = choice["message"] if "chat" in url else {"role": "assistant", "content": choice["text"]}
    assert message == {"role": "assistant", "content": TEXT}

    line = json.loads(error_line(bad_request(4, id="a", openai=True)))
    assert (line["custom_id"], line["response"]["status_code"]) == ("a", 400)
    assert line["response"]["body"]["error"]["message"] == "line 4 is not valid JSON"


def test_distinguishes_ids_of_both_types() -> None:
    ids = IdSet()
    assert ids.add(1)
    assert ids.add("1")
    assert not ids.add(1)
    assert 1 in ids
    assert 2 not in ids
    ids.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def write_answers(path: Path, *ids: int) -> None:
    file = AnswerFile(path)
    file.add([answer(id) for id in ids])
    file.close()


def test_counts_existing_answers(path: Path) -> None:
    write_answers(path, 1, 2)
    file = AnswerFile(path)
    file.add([bad_request(3)])
    file.close()
    file = AnswerFile(path)
    assert (file.count, file.errors) == (3, 1)
    assert [file.has(request(id)) for id in (1, 2, 3)] == [True, True, False]
    assert [file.has(bad_request(line)) for line in (2, 3)] == [False, True]
    file.close()


@pytest.mark.parametrize("tail", [b'{"id": 3, "te', b'{"id": 3}', b"\0" * 100, b"\0\0\n\0"])
def test_removes_an_incomplete_line(path: Path, tail: bytes) -> None:
    write_answers(path, 1, 2)
    with path.open("ab") as file:
        file.write(tail)
    write_answers(path, 3)
    assert [line["id"] for line in lines_of(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", [b"hello\n", b'{"text": "a"}\n', b"[]\n", b'{"id": null}\n', b"\xff\n"])
def test_rejects_and_keeps_another_file(path: Path, line: bytes) -> None:
    write_answers(path, 1)
    with path.open("ab") as file:
        file.write(line)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 2 is not an answer .*; choose another output"):
        AnswerFile(path)
    assert path.read_bytes() == before


def test_rejects_a_second_writer(path: Path) -> None:
    file = AnswerFile(path)
    with pytest.raises(ValueError, match="is being written by another process"):
        AnswerFile(path)
    file.close()
    AnswerFile(path).close()


@pytest.mark.parametrize("replaced", [False, True])
def test_notices_that_its_file_is_gone(path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    monkeypatch.setattr(module, "SYNC_SECONDS", 0)
    file = AnswerFile(path)
    file.add([answer(1)])
    file.check_name()
    path.unlink()
    if replaced:
        path.write_text("mine")
    with pytest.raises(ValueError, match="was removed or replaced during the run; start it again"):
        file.check_name()
    with pytest.raises(ValueError, match="was removed or replaced"):
        file.add([answer(2)])
    file.close()
    assert not replaced or path.read_text() == "mine"


def test_keeps_whole_lines_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answers(path, 1)
    file = AnswerFile(path)

    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="the disk is full; once that is fixed, the same command resumes"):
            file.add([answer(2)])
    file.close()
    assert [line["id"] for line in lines_of(path)] == [1]
    write_answers(path, 2)
    assert [line["id"] for line in lines_of(path)] == [1, 2]


def test_keeps_whole_lines_where_half_a_line_fits(path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_answers(path, 1)
    size = path.stat().st_size
    file = AnswerFile(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # as if the disk were full there
    try:
        with pytest.raises(OSError, match=r"once that is fixed, the same command resumes: '.*jsonl'"):
            file.add([answer(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        file.close()
    assert path.stat().st_size == size
    write_answers(path, 2)
    assert [line["id"] for line in lines_of(path)] == [1, 2]


WRITER = """
import sys
from pathlib import Path
from phi3_jax.batch.answers import Answer, AnswerFile
from phi3_jax.batch.requests import Request
file = AnswerFile(Path(sys.argv[1]))
print("open", flush=True)
for id in range(1500):
    request = Request(id + 1, id, "Once", None)
    if not file.has(request):
        file.add([Answer(request, "a" * (id % 977), "stop", 1, 1)])
file.close()
"""


@pytest.mark.slow
def test_kills_neither_lose_nor_repeat_answers(path: Path) -> None:
    draws = random.Random(3)
    command = [sys.executable, "-c", WRITER, str(path)]
    kills = 0
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draws.uniform(0, 0.05))
            process.kill()
        kills += process.returncode < 0
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert kills
    assert [line["id"] for line in lines_of(path)] == list(range(1500))
