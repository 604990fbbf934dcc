"""How far the work on a file is: a live bar on a terminal, a plain line now and then anywhere else."""

import sys
from contextlib import ExitStack
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10
"""Between two lines where there is no terminal."""


def time_left(seconds: float) -> str:
    """As `FileProgress.update` tells it."""
    whole = round(seconds)
    return f", {whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} left"


class FileProgress:
    """Shows on standard error what is told, and the share of the file, as a context manager.

    Args:
        total: lines or rows of the input (or what else the work is counted in), by which the share is told;
            None: not known.
        show: False prints nothing.
    """

    def __init__(self, total: int | None, show: bool):
        self._total, self._show = total, show
        self._printed = monotonic()
        self._bar: Progress | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "FileProgress":
        console = Console(stderr=True)
        # Not the console's own word: FORCE_COLOR, which many CI systems set, makes it call a file a terminal.
        if self._show and sys.stderr.isatty() and not console.is_dumb_terminal:
            columns = (
                TextColumn("{task.fields[told]}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("elapsed,"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = self._stack.enter_context(Progress(*columns, console=console))
            self._task = self._bar.add_task("", total=self._total, told="")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update(self, told: str, line: float, left: str = "") -> None:
        """The input is done as far as this line (or row); `left` is told where no bar shows it."""
        if self._total:
            told += f", {min(1.0, line / self._total):.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=line, told=told)
        elif self._show and monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = monotonic()
            print(told + left, file=sys.stderr, flush=True)
