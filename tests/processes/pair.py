"""Runs two processes with two CPU devices each on this machine; none outlives the call."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

GRACE = 100
"""Seconds that a process may run after the other has failed; JAX itself ends it some time later."""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    """Returns a free port below the range that the system gives to others."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def run_pair(
    first: Sequence[object],
    second: Sequence[object],
    *,
    logs: Path,
    timeout: float,
    stdin: str = "",
    environment: dict[str, str] | None = None,
    watch: Callable[[Sequence["subprocess.Popen[bytes]"]], None] | None = None,
) -> list[Ended]:
    """Runs `python FIRST` and `python SECOND` as processes 0 and 1; the first gets `stdin`.

    `watch` is called with both repeatedly while they run.

    Raises:
        AssertionError: a process has not ended after `timeout` seconds.
    """
    both = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    inherited = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    (logs / "stdin").write_text(stdin)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, arguments in enumerate((first, second)):
            with (
                (logs / "stdin").open() if number == 0 else open(os.devnull) as input_,
                (logs / f"{number}.out").open("w") as out,
                (logs / f"{number}.err").open("w") as err,
            ):
                environ = inherited | both | {"JAX_PROCESS_ID": str(number)} | (environment or {})
                command = [sys.executable, *map(str, arguments)]
                processes.append(subprocess.Popen(command, stdin=input_, stdout=out, stderr=err, env=environ))
        end = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
            if any(codes):
                end = min(end, time.monotonic() + GRACE)
            if watch is not None:
                watch(processes)
            time.sleep(0.1)
        if None in codes:
            for process in processes:
                process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
            time.sleep(5)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ended = [
        Ended(process.returncode, *((logs / f"{number}.{kind}").read_text() for kind in ("out", "err")))
        for number, process in enumerate(processes)
    ]
    for number, (code, one) in enumerate(zip(codes, ended, strict=True)):
        assert code is not None, (
            f"process {number} of codes {codes} had not ended; the end of its errors: {one.err[-6000:]}"
        )
    return ended
