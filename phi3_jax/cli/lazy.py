"""Groups of commands that import a command's module only when that command runs."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from phi3_jax.errors import UserError


def lazy_group(commands: Mapping[str, str], prefix: str = "") -> type[TyperGroup]:
    """Returns a group class with these commands.

    Args:
        commands: each command's name and its line in the help.
        prefix: precedes the modules' names; command `find-it` is `app` in `phi3_jax.cli.<prefix>find_it`.
    """

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any):
            super().__init__(**attributes)
            # Placeholders with name and help only.
            self.commands = {name: TyperCommand(name, help=line) for name, line in commands.items()}

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            """Returns the command that runs."""
            name, placeholder, rest = super().resolve_command(ctx, args)
            return name, placeholder and _load(str(name), prefix), rest

    return LazyGroup


def _load(name: str, prefix: str) -> Any:
    """Imports a command.

    Raises:
        UserError: it needs a library that is not installed.
    """
    try:
        with _delayed_interrupt():
            module = import_module(f"phi3_jax.cli.{prefix}{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "phi3_jax":
            raise
        raise UserError(f"{name} needs more libraries ({error}); pip install 'phi3-jax[train]'") from error
    command = typer.main.get_command(module.app)
    command.name = name
    if command.callback is not None:
        command.callback = _with_checked_numbers(command.callback)
    return command


def _with_checked_numbers(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses counts that int32 cannot hold, as lengths and rows on devices; only seeds may be larger."""

    @wraps(callback)
    def checked(**options: Any) -> Any:
        for name, value in options.items():
            if isinstance(value, int) and abs(value) >= 2**31 and name != "seed":
                raise UserError(f"--{name.replace('_', '-')} {value!s:.40} must be below 2**31")
        return callback(**options)

    return checked


@contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block: an import of native code that is interrupted may crash."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts:
        raise KeyboardInterrupt
