"""A conversation in a terminal or a pipe: a line in, an answer out, commands behind a slash."""

import logging
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

from phi3_jax.cli.interrupt import Interrupt
from phi3_jax.errors import UserError
from phi3_jax.generation.chat import ChatSession
from phi3_jax.parallel.distributed import from_primary
from phi3_jax.parallel.messages import tell

logger = logging.getLogger(__name__)

HELP = """\
/reset        start a new conversation; the system message stays
/system TEXT  tell the model this before everything else; without TEXT, nothing
/save FILE    write the conversation
/load FILE    go on from a written one
/help         this
/exit         leave, as the end of input does
Ctrl-C stops an answer; pressed again, or at the prompt, it leaves."""


def converse(session: ChatSession) -> None:
    """Reads lines until the end of input or /exit; answers go to standard output, all else to standard error.

    In a terminal an error is told and the conversation goes on; in a pipe it ends there.
    """
    terminal = from_primary(lambda: sys.stdin.isatty() and sys.stdout.isatty())
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited, and brought back with the arrow keys
        tell("/help lists the commands; Ctrl-D leaves.")
    while True:
        try:
            line = from_primary(lambda: input("> " if terminal else ""))
        except EOFError:
            break
        except KeyboardInterrupt:
            tell("")
            raise
        try:
            if line.startswith("/"):
                if not _obey(session, line):
                    return
            elif line.strip():
                _answer(session, line.strip())
        except (ValueError, OSError) as error:
            if not terminal or isinstance(error, BrokenPipeError):
                raise
            tell(str(error))
    if terminal:
        tell("")


def _answer(session: ChatSession, text: str) -> None:
    begin = time.perf_counter()
    first = None
    with Interrupt() as interrupt, closing(session.reply(text)) as pieces:
        for piece in pieces:
            first = first or time.perf_counter()
            print(piece, end="", flush=True)
            if interrupt.stops():
                break
    print(flush=True)
    turn, end = session.last, time.perf_counter()
    assert turn is not None
    if turn.stopped == "max_new_tokens":
        tell(f"[cut off after {turn.new_tokens} tokens; --max-new-tokens sets how many]")
    elif turn.stopped == "context":
        tell("[cut off: the model's context is full; /reset starts a new conversation]")
    logger.info(
        "%d prompt tokens, %d of them cached; first text after %.1f s; %d new tokens in %.1f s",
        *(turn.prompt_tokens, turn.cached_tokens, (first or end) - begin, turn.new_tokens, end - begin),
    )


def _obey(session: ChatSession, line: str) -> bool:
    """Carries out a command; False: the conversation is over."""
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    match name:
        case "exit":
            return False
        case "help":
            tell(HELP)
        case "reset":
            session.reset()
            tell("[a new conversation]")
        case "system":
            session.system = argument or None
            tell("[the system message is set]" if argument else "[there is no system message]")
        case "save" | "load" if not argument:
            raise UserError(f"/{name} needs a file: /{name} FILE")
        case "save":
            session.save(Path(argument).expanduser())
            tell(f"[{len(session.history)} messages written]")
        case "load":
            session.load(Path(argument).expanduser())
            tell(f"[{len(session.history)} messages read]")
        case _:
            raise UserError(
                f"there is no command /{name}; /help lists them (a space in front makes the line a message)"
            )
    return True
