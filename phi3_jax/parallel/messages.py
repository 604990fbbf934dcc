"""Lines for the user on standard error, and how errors end a program."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from phi3_jax.errors import UserError
from phi3_jax.runs.platforms import skip_absent_tpu


def _distributed() -> Any:
    """Returns `phi3_jax.parallel.distributed` if a command has imported it; on its own it imports JAX."""
    return sys.modules.get("phi3_jax.parallel.distributed")


def is_primary() -> bool:
    """Whether this process prints."""
    module = _distributed()
    return module is None or module.is_primary()


def tell(line: str) -> None:
    """A line for the user beside the output."""
    if is_primary():
        print(line, file=sys.stderr, flush=True)


def tell_error(error: BaseException) -> None:
    """What went wrong, told by process 0 and by the process that it went wrong in."""
    if (of := getattr(error, "of_process", None)) is not None:
        tell(f"phi3-jax: {error} (in process {of})" if of else f"phi3-jax: {error}")
        return
    where = ""
    if not is_primary():
        where = f" (process {_distributed().process_index()})"
    print(f"phi3-jax{where}: {error}", file=sys.stderr)


def run_program(program: Callable[[], object]) -> NoReturn:
    """Runs a program; an error that the user can mend is one line on standard error, not a traceback."""
    skip_absent_tpu()
    try:
        program()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        tell_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
