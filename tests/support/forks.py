"""Commands that start at once: processes forked from one that has imported what they need.

Imports take most of the time of a small command, so that tests which start one twenty times use these.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from commands import HIDES_TORCH

SERVER = """
import json
import os
import sys

from phi3_jax.cli import main

for line in sys.stdin:
    arguments, output = json.loads(line)
    process = os.fork()
    if process == 0:
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["phi3-jax", *arguments]
        main()
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Forks:
    """Starts commands, one at a time; a context manager.

    Args:
        modules: to import before.
        folder: for what commands print.
        environment: of all commands.
    """

    def __init__(self, modules: Sequence[str], folder: Path, environment: Mapping[str, str]):
        self._output = folder / "output"
        imports = "".join(f"import {name}\n" for name in modules)
        self._server = subprocess.Popen(
            [sys.executable, "-c", HIDES_TORCH + imports + SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, *arguments: object) -> "Fork":
        """Starts `phi3-jax ARGUMENTS`, whose predecessor has ended."""
        assert self._server.stdin is not None
        line = json.dumps([list(map(str, arguments)), str(self._output)])
        self._server.stdin.write(f"{line}\n".encode())
        process = self.read(60)
        assert process is not None
        return Fork(self, process, self._output)

    def read(self, timeout: float) -> int | None:
        """Returns the next number that the server prints; None if it prints none in `timeout` seconds."""
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], timeout)[0]:
            return None
        return int(self._server.stdout.readline())


class Fork:
    """A command that was started, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: Forks, pid: int, output: Path):
        self._server, self.pid, self._output = server, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code; None while the command runs."""
        if self.returncode is None:
            self.returncode = self._server.read(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Returns the exit code.

        Raises:
            subprocess.TimeoutExpired: the command still runs.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("phi3-jax", timeout)
            self.returncode = self._server.read(max(0.0, end - time.monotonic()))
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Kills the command, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def text(self, timeout: float = 300) -> str:
        """Waits for the command's end, and returns all that it printed."""
        self.wait(timeout)
        return self._output.read_text()
