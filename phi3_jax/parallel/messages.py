"""Prints lines for the user on standard error, and ends programs."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn, TextIO

from phi3_jax.errors import UserError
from phi3_jax.runs.platforms import skip_absent_tpu
from phi3_jax.runs.streams import complete_standard_streams


def _process_index() -> int:
    """Returns this process's number, without importing JAX: 0 where nothing has imported it yet."""
    distributed = sys.modules.get("phi3_jax.parallel.distributed")
    return 0 if distributed is None else distributed.process_index()


def show_log(verbose: bool = False) -> None:
    """Shows the package's warnings on standard error, or with `verbose` what all libraries log.

    Libraries also warn of what this package tells by itself, such as a name that cannot be reached. Does
    nothing where the application has set up its log.
    """
    root = logging.getLogger()
    # Orbax logs while it is imported, by which absl sets up a log.
    if any(type(handler) is not logging.StreamHandler for handler in root.handlers):
        return
    handler = logging.StreamHandler()
    if not verbose:
        handler.addFilter(lambda record: record.name.startswith(("phi3_jax", "jax")))
        for name in ("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):  # these libraries have handlers of their own
            os.environ.setdefault(name, "critical")
    level = logging.INFO if verbose else logging.WARNING
    warnings.showwarning = _show_warning
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", handlers=[handler], force=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a library's warning as one line, without the line of code that gave it."""
    logging.getLogger("phi3_jax").warning("%s", " ".join(str(message).split()))


def tell(line: str) -> None:
    """Prints a line for the user beside the output, in process 0 only."""
    if _process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def tell_error(error: BaseException) -> None:
    """Prints an error as one line, in process 0 and in the process where it was raised."""
    text = " ".join(line.strip() for line in str(error).splitlines())  # libraries' own have several
    if (origin := getattr(error, "of_process", None)) is not None:
        tell(f"phi3-jax: {text} (in process {origin})" if origin else f"phi3-jax: {text}")
        return
    process = f" (process {index})" if (index := _process_index()) else ""
    print(f"phi3-jax{process}: {text}", file=sys.stderr)


def run_program(program: Callable[[], object]) -> NoReturn:
    """Runs a program and exits; errors that the user can mend are one line, others keep their traceback."""
    skip_absent_tpu()
    complete_standard_streams()
    try:
        program()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        tell_error(error)
        sys.exit(1)
    except MemoryError as error:
        tell_error(UserError(f"there is not enough memory ({error or 'MemoryError'})"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:  # XLA's errors
        if "RESOURCE_EXHAUSTED" in str(error):
            tell_error(UserError(f"there is not enough memory on a device ({str(error).splitlines()[0]})"))
            sys.exit(1)
        heartbeats = sys.modules.get("phi3_jax.parallel.heartbeats")
        if heartbeats is not None and "jax" in type(error).__module__:
            heartbeats.wait_for_lost_process()
        raise
    sys.exit(0)
