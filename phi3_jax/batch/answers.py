"""The output file of a batch: answers are appended as they finish, and each request is answered once."""

import errno
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from phi3_jax.batch.answered import Answered, CountsAnswered, Key, answer_key, error_key, key_of_line
from phi3_jax.batch.requests import CHAT, BadRequestError, Request
from phi3_jax.errors import UserError
from phi3_jax.runs.files import sync

SYNC_SECONDS = 1.0
"""The time between two forced writes to the disk, each of which takes as long as a few tokens."""


@dataclass(frozen=True)
class Answer:
    """The model's answer to a request."""

    request: Request
    text: str
    finish_reason: str
    """ "stop" (an end token or a stop string) or "length" (the limit of tokens)."""
    prompt_tokens: int
    completion_tokens: int

    @property
    def id(self) -> str | int:
        """The id of the request."""
        return self.request.id


def result_line(result: Answer | BadRequestError) -> bytes:
    """Returns the output line of an answer or an error, in the form of its request."""
    if isinstance(result, Answer):
        return answer_line(result, created=int(time.time()))
    return error_line(result)


def answer_line(answer: Answer, *, created: int) -> bytes:
    """Returns the output line of an answer; OpenAI's form includes `created`, a Unix time."""
    request = answer.request
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    if request.openai is None:
        values = {"id": request.id, "text": answer.text, "finish_reason": answer.finish_reason}
        return _line(values | {"usage": usage})
    is_chat = request.openai == CHAT
    content: dict[str, Any] = {"text": answer.text}
    if is_chat:
        content = {"message": {"role": "assistant", "content": answer.text}}
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{_number(request)}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model or "",
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": answer.finish_reason}],
        "usage": usage,
    }
    return _line(_openai_response(request, 200, body))


def error_line(error: BadRequestError) -> bytes:
    """Returns the output line of a request that cannot be answered."""
    values = {"code": error.code, "message": str(error)}
    place: dict[str, Any] = {} if error.file is None else {"file": error.file.name}
    place |= {"line": error.line}
    if not error.openai:
        return _line({"id": error.id, **place, "error": values})
    body = {"error": values | {"type": "invalid_request_error", "param": None}}
    return _line(_openai_response(error, 400, body) | place)


def _openai_response(request: Request | BadRequestError, status: int, body: dict[str, Any]) -> dict[str, Any]:
    number = _number(request)
    response = {"status_code": status, "request_id": f"req-{number}", "body": body}
    return {"id": f"batch_req-{number}", "custom_id": request.id, "response": response, "error": None}


def _number(request: Request | BadRequestError) -> str:
    """Returns a number that no other line has, also of several files."""
    return f"{request.line}" if request.file is None else f"{request.file.number}-{request.line}"


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def result_key(result: Answer | BadRequestError) -> Key:
    """Returns the key of an answer or an error."""
    if isinstance(result, Answer):
        return answer_key(result.id)
    return error_key(result.line, None if result.file is None else result.file.name)


class AnswerFile(CountsAnswered):
    """The answers to one input file, one JSON object a line.

    Only one process can open the file at a time. A line that a killed process left incomplete is removed.
    Lines survive a kill of the process at once and a power failure after a second.

    Args:
        path: created if it does not exist; the answers in it count.

    Raises:
        UserError: another process writes the file, or it holds something other than answers.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{path} is being written by another process") from None
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            self._answered = Answered()
            stack.callback(self._answered.close)
            self._file = stack.enter_context(path.open("r+b" if path.exists() else "x+b"))
            self._synced_bytes = self._read(self._file)
            self._sync_time = 0.0
            self._file.truncate(self._synced_bytes)
            self._file.seek(self._synced_bytes)
            sync(path.parent)
            self._stack = stack.pop_all()

    def add(self, results: Sequence[Answer | BadRequestError]) -> None:
        """Appends answers and errors.

        Raises:
            OSError: they cannot be written; the file keeps only whole lines.
        """
        end = self._file.tell()
        try:
            self._file.write(b"".join(map(result_line, results)))
            self._file.flush()
            end = self._synced_bytes
            self._sync(SYNC_SECONDS)
        except OSError as error:
            with suppress(OSError):  # it tries to write the rest of its buffer, and closes in any case
                self._file.close()
            os.truncate(self.path, end)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise OSError(
                error.errno, f"{reason}; once that is fixed, the same command resumes", str(self.path)
            ) from error
        for result in results:
            self._answered.add(result_key(result))

    def close(self) -> None:
        """Writes everything to the disk and releases the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._stack.close()

    def check_name(self) -> None:
        """Checks that the file still has its name.

        Raises:
            UserError: it was removed or replaced, so that nobody could read the answers.
        """
        written = os.fstat(self._file.fileno())
        if not self.path.exists() or not os.path.samestat(written, self.path.stat()):
            raise UserError(f"{self.path} was removed or replaced during the run; start it again")

    def _sync(self, seconds: float) -> None:
        """Forces a write to the disk unless there was one in the last `seconds`."""
        if time.monotonic() - self._sync_time < seconds:
            return
        os.fsync(self._file.fileno())
        self.check_name()
        self._sync_time, self._synced_bytes = time.monotonic(), self._file.tell()

    def _read(self, file: BinaryIO) -> int:
        """Counts the lines of the file and returns the size of all whole lines in bytes."""
        size = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                key = key_of_line(line)
            except UserError as error:
                if not line.strip(b"\0\n"):
                    break  # a power failure can leave zeros in place of lines
                raise UserError(
                    f"{self.path}, line {number} is not an answer ({error}); choose another output, or "
                    "remove the file"
                ) from error
            self._answered.add(key)
            size += len(line)
        return size
