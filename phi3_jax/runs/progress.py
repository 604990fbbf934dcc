"""Progress of the work on a file: a live bar on a terminal, otherwise a line every few seconds."""

import sys
from contextlib import ExitStack
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10
"""Time between two lines if there is no terminal."""


def time_left(seconds: float) -> str:
    """Returns the text for the `left` of `FileProgress.update`."""
    whole = round(seconds)
    return f", {whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} left"


class FileProgress:
    """Prints a text and the finished share of a file to standard error; a context manager.

    Args:
        total: lines or rows of the input, or other units of work; None: unknown, so that no share is printed.
        show: whether to print.
    """

    def __init__(self, total: int | None, show: bool):
        self._total, self._show = total, show
        self._printed = monotonic()
        self._bar: Progress | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "FileProgress":
        console = Console(stderr=True)
        # `console.is_terminal` is True for a file if FORCE_COLOR is set, as in many CI systems.
        if self._show and sys.stderr.isatty() and not console.is_dumb_terminal:
            columns = (
                TextColumn("{task.fields[text]}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("elapsed,"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = self._stack.enter_context(Progress(*columns, console=console))
            self._task = self._bar.add_task("", total=self._total, text="")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update(self, text: str, line: float, left: str = "") -> None:
        """Reports that the input is finished up to this line or row; `left` is printed if there is no bar."""
        if self._total:
            text += f", {min(1.0, line / self._total):.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=line, text=text)
        elif self._show and monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = monotonic()
            print(text + left, file=sys.stderr, flush=True)
