"""Standard streams that are closed, and those of another encoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from phi3_jax.parallel.messages import run_program, tell

def program():
    text = sys.stdin.read()
    tell("a note")
    print("answer: " + text + "\\u00e9\\u4f60")

run_program(program)
"""

LOG = """
import logging, sys, warnings
from phi3_jax.parallel.messages import run_program, show_log

logging.basicConfig()  # as absl does when Orbax is imported

def program():
    show_log(verbose="-v" in sys.argv)
    logging.getLogger("huggingface_hub").warning("retrying")
    logging.getLogger("absl").error("a thread has failed")
    logging.getLogger("phi3_jax.model").warning("a warning")
    logging.getLogger("phi3_jax.model").info("a note")
    warnings.warn("not\\nwritten")
    raise OSError("cannot be read:\\n  it is broken")

run_program(program)
"""


def run(closed: str, tmp_path: Path, **environment: str) -> tuple[int, str, str]:
    files = [tmp_path / "out", tmp_path / "err"]
    command = f'"$0" -c "$1" >{files[0]} 2>{files[1]} {closed}'
    (tmp_path / "in").write_text("hi ")
    with (tmp_path / "in").open() as given:
        done = subprocess.run(
            ["sh", "-c", command, sys.executable, CODE], stdin=given, env=os.environ | environment
        )
    out, err = (file.read_text(encoding="utf-8") for file in files)
    return done.returncode, out, err


def test_a_closed_input_is_empty(tmp_path: Path) -> None:
    assert run("<&-", tmp_path) == (0, "answer: é你\n", "a note\n")


def test_a_closed_output_is_an_error(tmp_path: Path) -> None:
    assert run(">&-", tmp_path) == (1, "", "a note\nphi3-jax: [Errno 9] Bad file descriptor\n")


def test_notes_for_a_closed_stderr_do_not_go_to_the_output(tmp_path: Path) -> None:
    assert run("2>&-", tmp_path) == (0, "answer: hi é你\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    assert run(">/dev/full", tmp_path)[::2] == (1, "a note\nphi3-jax: [Errno 28] No space left on device\n")


def test_escapes_what_the_locale_cannot_express(tmp_path: Path) -> None:
    code, out, _ = run("", tmp_path, PYTHONIOENCODING="ascii")
    assert (code, out) == (0, "answer: hi \\xe9\\u4f60\n")
    name = os.fsdecode(b"\xff")
    script = f"from phi3_jax.parallel.messages import run_program\nrun_program(lambda: print({name!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\udcff\n")


def test_shows_the_log_of_the_package_and_an_error_in_one_line_each() -> None:
    """What libraries log besides is shown with `verbose` only."""

    def errors(*options: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", LOG, *options], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr.splitlines()

    own = ["WARNING: a warning", "WARNING: not written", "phi3-jax: cannot be read: it is broken"]
    assert errors() == own
    theirs = ["WARNING: retrying", "ERROR: a thread has failed"]
    assert errors("-v") == [*theirs, own[0], "INFO: a note", *own[1:]]
