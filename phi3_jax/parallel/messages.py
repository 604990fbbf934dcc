"""Prints lines for the user on standard error, and ends programs."""

import sys
from collections.abc import Callable
from typing import NoReturn

from phi3_jax.errors import UserError
from phi3_jax.runs.platforms import skip_absent_tpu
from phi3_jax.runs.streams import complete_standard_streams


def _process_index() -> int:
    """Returns this process's number, without importing JAX: 0 where nothing has imported it yet."""
    distributed = sys.modules.get("phi3_jax.parallel.distributed")
    return 0 if distributed is None else distributed.process_index()


def tell(line: str) -> None:
    """Prints a line for the user beside the output, in process 0 only."""
    if _process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def tell_error(error: BaseException) -> None:
    """Prints an error, in process 0 and in the process where it was raised."""
    if (origin := getattr(error, "of_process", None)) is not None:
        tell(f"phi3-jax: {error} (in process {origin})" if origin else f"phi3-jax: {error}")
        return
    process = f" (process {index})" if (index := _process_index()) else ""
    print(f"phi3-jax{process}: {error}", file=sys.stderr)


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
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        tell_error(UserError(f"there is not enough memory on a device ({str(error).splitlines()[0]})"))
        sys.exit(1)
    sys.exit(0)
