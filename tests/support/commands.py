"""Runs commands in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


HEEDS_SIGINT = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Without this, processes that a shell starts in the background ignore SIGINT, as do their children."""


HIDES_TORCH = """
import sys

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden)
"""
"""tensorboardX imports PyTorch where it is installed, which takes a third of the start of `finetune`."""


def start(*arguments: object, cache: Path, before: str = "") -> subprocess.Popen[bytes]:
    """Starts a command in a process of its own; the code `before` runs first."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{HEEDS_SIGINT}from phi3_jax.cli import main\n{before}\nmain()",
            *map(str, arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PHI3_JAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
    )
