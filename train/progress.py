"""The progress of a run: a live bar on a terminal, a plain line now and then anywhere else."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from time import monotonic

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10
"""The time between two lines where there is no terminal."""

NOTABLE_WAIT = 0.05
"""The share of the time that the devices wait for batches from which on it is shown."""


class Progress:
    """Shows steps, loss, metrics, speed and time on standard error; used in `with`.

    Args:
        total_steps: of the whole run.
        start: the steps that a resumed run has done before.
        show: False prints nothing, for processes other than the first.
    """

    def __init__(self, total_steps: int, start: int, show: bool) -> None:
        self._total, self._step, self._show = total_steps, start, show
        self._values: dict[str, float] = {}
        self._began = self._printed = monotonic()
        # The time at which the run will end.
        self._end: float | None = None
        self._printed_step: int | None = None
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Progress":
        # The console's own answer is wrong where FORCE_COLOR is set: it then takes a file for a terminal.
        if self._show and sys.stderr.isatty() and not self._console.is_dumb_terminal:
            self._live = self._stack.enter_context(Live(console=self._console, get_renderable=self._render))
        return self

    def __exit__(self, *_: object) -> None:
        if self._show and self._live is None and self._printed_step != self._step:
            self._print_line()
        self._stack.close()

    def update(
        self, step: int, values: Mapping[str, float | None], seconds_left: float | None = None
    ) -> None:
        """Shows that `step` steps are done; values stay until newer ones come, None changes nothing.

        tokens_per_second, flops_per_second and mfu (0 to 1) are shown with their units, input_wait (0 to 1)
        from `NOTABLE_WAIT` on, and others by name. The time left counts down between updates.
        """
        self._step = step
        # A new dict, because the bar's thread may be reading the old one.
        self._values = self._values | {name: value for name, value in values.items() if value is not None}
        if seconds_left is not None:
            self._end = monotonic() + seconds_left
        if self._show and self._live is None and monotonic() - self._printed >= PLAIN_SECONDS:
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._live is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._show:
            print(line, file=sys.stderr, flush=True)

    def _print_line(self) -> None:
        self._printed, self._printed_step = monotonic(), self._step
        self.say(", ".join((self._steps(), *self._numbers(), self._time())))

    def _render(self) -> RenderableType:
        top = Table.grid(padding=(0, 2), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        bar = ProgressBar(total=self._total, completed=self._step)
        top.add_row(self._steps(), bar, self._time())
        numbers = Text("  ".join(self._numbers()), style="cyan", no_wrap=True, overflow="ellipsis")
        return Group(top, numbers)

    def _steps(self) -> str:
        return f"step {self._step:,}/{self._total:,}"

    def _time(self) -> str:
        elapsed = f"{_clock(monotonic() - self._began)} elapsed"
        return (
            elapsed if self._end is None else f"{elapsed}, {_clock(max(0.0, self._end - monotonic()))} left"
        )

    def _numbers(self) -> list[str]:
        units = {
            "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
            "flops_per_second": lambda value: f"{value / 1e12:,.3g} TFLOP/s",
            "mfu": lambda value: f"MFU {100 * value:.1f}%",
            "input_wait": lambda value: f"{value:.0%} waiting for batches",
        }
        values = {
            name: value
            for name, value in self._values.items()
            if name != "input_wait" or value >= NOTABLE_WAIT
        }
        named = [f"{name} {value:.4g}" for name, value in values.items() if name not in units]
        return named + [text(values[name]) for name, text in units.items() if name in values]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
