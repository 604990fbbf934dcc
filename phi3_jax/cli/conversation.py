"""A conversation in a terminal or a pipe: lines are messages, or commands that begin with a slash."""

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
/system TEXT  set the system message, or remove it without TEXT
/save FILE    write the conversation to a file
/load FILE    continue a conversation from a file
/help         list the commands
/exit         leave; the end of input does the same
Ctrl-C stops an answer; pressed again, or at the prompt, it leaves."""


def converse(session: ChatSession) -> None:
    """Answers lines until the end of input or /exit.

    Answers go to standard output, everything else to standard error. In a terminal an error is printed and
    the conversation continues; in a pipe it ends the conversation.
    """
    terminal = from_primary(lambda: sys.stdin.isatty() and sys.stdout.isatty())
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and history
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
        except (UserError, OSError) as error:
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
    """Runs a command; returns False where it ends the conversation."""
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
