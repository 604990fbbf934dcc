"""Renders chat templates: the program of the process that `_worker.Renderer` starts.

A template is a program by whoever wrote the checkpoint. Jinja's sandbox keeps it from the interpreter, but
not from looping for ever or filling the memory, and code in C cannot be interrupted from within. So templates
run in a process of their own, which the system limits. This file is run as a script and imports only Jinja.

Messages are JSON, each after its length in 8 bytes. Those on stdin have `template`, `messages`, `variables`
and `most_characters`. Those on stdout have `text` and `spans`, or `error` and `kind`.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationBlocks(Extension):
    """Renders `{% generation %}...{% endgeneration %}` as its content, and notes where it is."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja2)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Macro) -> str:
        text = caller()
        output = self.environment.output  # type: ignore[attr-defined]
        output.spans.append((output.length, output.length + len(text)))
        return text


class _Output:
    """The text that a template has written so far."""

    def __init__(self, most: int) -> None:
        self.spans: list[tuple[int, int]] = []
        self.length = 0
        self._most = most

    def join(self, pieces: Iterator[str]) -> str:
        kept = []
        for piece in pieces:
            self.length += len(piece)
            if self.length > self._most:
                raise OverflowError(f"its text is longer than {self._most:,} characters")
            kept.append(piece)
        return "".join(kept)


@lru_cache(maxsize=16)
def _compile(template: str) -> tuple[ImmutableSandboxedEnvironment, jinja2.Template]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment, environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON without the escapes for HTML that Jinja's own `tojson` adds."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _render(request: dict[str, Any]) -> dict[str, Any]:
    output = _Output(request["most_characters"])
    try:
        environment, template = _compile(request["template"])
        environment.output = output  # type: ignore[attr-defined]
        variables = request["variables"] | {"messages": request["messages"]}
        return {"text": output.join(template.generate(variables)), "spans": output.spans}
    except MemoryError:
        return {"error": "it needs too much memory", "kind": "limit"}
    except OverflowError as error:
        return {"error": str(error), "kind": "failure"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "kind": "syntax"}
    except Exception as error:  # an expression in a template can raise anything
        kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
        return {"error": f"{kind}{error}", "kind": "failure"}


def _limit_memory(memory: int) -> None:
    """Limits this process to so many bytes, on systems that can."""
    with suppress(ImportError):
        import resource

        with suppress(ValueError, OSError):  # macOS has no limit on memory
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(requests: BinaryIO, replies: BinaryIO, seconds: float) -> None:
    while length := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(length, "little")))
        # The signal ends the process, also within C. Time counts only while the process runs.
        if timed := hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = _render(request)
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        content = json.dumps(reply).encode()
        replies.write(len(content).to_bytes(8, "little") + content)
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if hasattr(signal, "SIGPROF"):  # a profiler in the process that asks may ignore or block it
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _limit_memory(int(sys.argv[2]))
    _serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
