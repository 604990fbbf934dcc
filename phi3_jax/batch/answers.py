"""The file of answers: appended to as they finish, and gone on with after a kill; each request's once."""

import errno
import json
import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from phi3_jax.batch.requests import CHAT, BadRequestError, Request
from phi3_jax.errors import UserError

SECONDS = 1.0
"""Between two times that the disk is made to write: each takes it as long as a few tokens."""


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    request: Request
    text: str
    finish_reason: str
    """ "stop": an end token or a stop string; "length": as many tokens as were allowed."""
    prompt_tokens: int
    completion_tokens: int

    @property
    def id(self) -> str | int:
        """The request's."""
        return self.request.id


def answer_line(answer: Answer, *, created: int) -> bytes:
    """The answer in the request's form; `created` is a `time.time()`, which OpenAI's form tells."""
    request = answer.request
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    if request.openai is None:
        values = {"id": request.id, "text": answer.text, "finish_reason": answer.finish_reason}
        return _line(values | {"usage": usage})
    said: dict[str, Any] = {"text": answer.text}
    if request.openai == CHAT:
        said = {"message": {"role": "assistant", "content": answer.text}}
    body = {
        "id": f"{'chatcmpl' if request.openai == CHAT else 'cmpl'}-{request.line}",
        "object": "chat.completion" if request.openai == CHAT else "text_completion",
        "created": created,
        "model": request.model or "",
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}],
        "usage": usage,
    }
    return _line(_openai(request.line, request.id, 200, body))


def line_of(answer: Answer | BadRequestError) -> bytes:
    """What is written about a request."""
    if isinstance(answer, Answer):
        return answer_line(answer, created=int(time.time()))
    return error_line(answer)


def error_line(error: BadRequestError) -> bytes:
    """What is wrong with a line, in the form that the line had."""
    fault = {"code": error.code, "message": str(error)}
    if not error.openai:
        return _line({"id": error.id, "line": error.line, "error": fault})
    body = {"error": fault | {"type": "invalid_request_error", "param": None}}
    return _line(_openai(error.line, error.id, 400, body) | {"line": error.line})


def _openai(line: int, id: str | int | None, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req-{line}", "body": body}
    return {"id": f"batch_req-{line}", "custom_id": id, "response": response, "error": None}


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


class Ids:
    """A set of requests' ids and lines' numbers, on disk where it is large."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", check_same_thread=False)  # a file of its own, gone at the end
        self._database.execute("create table ids (id text primary key) without rowid")

    def add(self, id: str | int) -> bool:
        """Whether it was not there yet."""
        cursor = self._database.execute("insert or ignore into ids values (?)", (json.dumps(id),))
        return cursor.rowcount > 0

    def __contains__(self, id: str | int) -> bool:
        found = self._database.execute("select 1 from ids where id = ?", (json.dumps(id),))
        return found.fetchone() is not None

    def close(self) -> None:
        self._database.close()


class AnswerFile:
    """The answers to one input, one JSON object a line.

    A line that a kill cut off is taken away when the file is opened again. One process at a time has it.
    Lines survive the process at once, and a power failure within a second.

    Args:
        path: made if it is not there; answers that are in it count.

    Raises:
        ValueError: another process writes it, or it holds something else than answers.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        """Answers and errors that are in the file."""
        self.errors = 0
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{path} is being written by another process") from None
        with ExitStack() as opened:
            opened.callback(self._lock.release)
            self._answered, self._refused = Ids(), Ids()
            opened.callback(self._answered.close)
            opened.callback(self._refused.close)
            self._file = opened.enter_context(path.open("r+b" if path.exists() else "x+b"))
            self._safe = self._read(self._file)
            """Bytes that the disk has for certain."""
            self._synchronised = 0.0
            self._file.truncate(self._safe)
            self._file.seek(self._safe)
            self._opened = opened.pop_all()

    def has(self, request: Request | BadRequestError) -> bool:
        """Whether the line is answered, or refused, in the file."""
        if isinstance(request, Request) and request.id in self._answered:
            return True
        return request.line in self._refused  # what is wrong with a request may be found late

    def add(self, answers: Sequence[Answer | BadRequestError]) -> None:
        """Appends answers, which the process then may not survive.

        Raises:
            OSError: they cannot be written; the file has whole lines only.
        """
        good = self._file.tell()
        try:
            self._file.write(b"".join(map(line_of, answers)))
            self._file.flush()
            good = self._safe
            self._synchronise(SECONDS)
        except OSError as error:
            self._file.close()  # what is left in its buffer must not be written later
            os.truncate(self.path, good)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise OSError(
                error.errno, f"{reason}; the same command goes on when that is mended", str(self.path)
            ) from error
        for answer in answers:
            if isinstance(answer, Answer):
                self._note(answer.id, None)
            else:
                self._note(None, answer.line)

    def close(self) -> None:
        """Lets others have the file, whose answers are on the disk."""
        if not self._file.closed:
            self._synchronise(0)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._opened.close()

    def _synchronise(self, seconds: float) -> None:
        """Has the disk write what is there, unless it did so in the last `seconds`."""
        if time.monotonic() - self._synchronised < seconds:
            return
        os.fsync(self._file.fileno())
        self._synchronised, self._safe = time.monotonic(), self._file.tell()

    def _note(self, id: str | int | None, refused: int | None) -> None:
        self.count += 1
        if refused is None:
            assert id is not None
            self._answered.add(id)
        else:
            self.errors += 1
            self._refused.add(refused)

    def _read(self, file: BinaryIO) -> int:
        """Notes what is there; the bytes up to the end of the last whole line."""
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                values = json.loads(line)
                id = values["custom_id" if "custom_id" in values else "id"]
                refused = values.get("line")
                if refused is None and not isinstance(id, str | int):
                    raise UserError("its id is missing")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not line.strip(b"\0\n"):
                    break  # a power failure leaves zeros where lines were to be
                raise UserError(
                    f"{self.path}, line {number} is no answer ({error}); choose another output, or remove it"
                ) from error
            self._note(id, refused)
            whole += len(line)
        return whole
