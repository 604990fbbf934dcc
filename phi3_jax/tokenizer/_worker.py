"""Runs `_renderer` in a process of its own, and asks it for texts."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError

SECONDS = 10
"""The processor time that rendering may take; published templates take milliseconds."""

MEMORY = 1 << 30
"""The bytes that the process may use."""

MOST_CHARACTERS = 1 << 24
"""The longest text, unless the messages themselves are longer."""


class Renderer:
    """A process that renders chat templates, one at a time; it starts at the first template.

    A template that exceeds a limit ends the process, and the next one starts another.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(
        self, template: str, messages: list[Any], variables: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text, and the start and stop of each generation block in it.

        Raises:
            UserError: the template failed or exceeded a limit. TypeError, ValueError: a value is not JSON.
        """
        content: dict[str, Any] = {"template": template, "messages": messages, "variables": variables}
        content["most_characters"] = MOST_CHARACTERS
        request = json.dumps(content).encode()
        if len(request) > MOST_CHARACTERS // 4:
            content["most_characters"] = 4 * len(request)
            request = json.dumps(content).encode()
        if self._owner != os.getpid():  # a fork shares the pipes of its parent
            self._process, self._owner, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            reply = self._ask(request)
        if "text" in reply:
            return reply["text"], [(start, stop) for start, stop in reply["spans"]]
        if reply["kind"] == "syntax":
            raise UserError(f"chat template, {reply['error']}")
        raise UserError(f"chat template failed: {reply['error']}")

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start()
        process = self._process
        try:
            reply = _exchange(process, request)
        except BaseException:  # an interrupt, whose reply is still to come
            self.close()
            raise
        if reply is None:
            reply = {"error": _reason(process.wait()), "kind": "limit"}
        if reply.get("kind") == "limit":
            self.close()
        return reply


def _exchange(process: "subprocess.Popen[bytes]", request: bytes) -> dict[str, Any] | None:
    """Returns the reply to a request, or None if the process ends instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(len(request).to_bytes(8, "little") + request)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    length = process.stdout.read(8)
    return json.loads(process.stdout.read(int.from_bytes(length, "little"))) if length else None


def _start() -> "subprocess.Popen[bytes]":
    program = Path(__file__).with_name("_renderer.py")
    # Jinja may lie in a folder that only this process has in its path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.Popen(
            [sys.executable, str(program), str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
    except OSError as error:
        raise UserError(
            f"chat templates run in a process of their own, which cannot be started with {sys.executable}: "
            f"{error.strerror}"
        ) from error


def _reason(status: int) -> str:
    if status == -getattr(signal, "SIGPROF", 0):
        return f"it runs for more than {SECONDS} seconds"
    return f"its process ended (status {status}), for want of memory or by a crash"


RENDERER = Renderer()
"""The one of this process."""
