"""Runs the examples of a page of documentation, and compares what they print with what the page shows.

A page is Markdown. Blocks of `python` run one after the other in one kernel; a block of `text` directly after
such a block shows what it prints. In blocks of `console`, lines that begin with `$ ` are commands, lines that
begin with `> ` continue them, and the others are what they print. A line `...` stands for any number of them.
Two comments may precede a block: `<!-- not run: REASON -->` and `<!-- numbers vary -->`.

As a command, this file runs pages and replaces the outputs that differ:
`python tests/support/pages.py docs/batch.md`.
"""

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DATA = {"war_and_peace.txt": "long_text/war_and_peace.txt"}
"""Files of the test data that pages use under these names."""

NOT_RUN, VARY = re.compile(r"<!-- not run: (.+) -->"), "<!-- numbers vary -->"
UNITS = {"s", "ms", "minutes", "tokens/s"}
PROGRESS = re.compile(r".+, \d+%(?:, [\d:]+ left)?|step \d+/\d+, .+ left")
"""Lines of long commands, whose number depends on the time that they take."""
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


class Example(NamedTuple):
    """A block of Python or one command, and what it prints."""

    language: str
    code: str
    shown: str
    line: int
    """The line of the page, from 0, at which the code begins."""
    lines: tuple[int, int]
    """The lines of the page that show the output: first, and one after the last."""
    not_run: str
    """Why tests cannot run it; empty if they do."""
    numbers_vary: bool


def examples(page: Path) -> list[Example]:
    """Returns the examples of a page in their order."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [example for index in range(len(tokens)) for example in _examples_at(tokens, index)]


def _examples_at(tokens: list[Token], index: int) -> Iterator[Example]:
    block = tokens[index]
    if block.type != "fence" or block.map is None or block.info not in ("python", "console"):
        return
    comment = tokens[index - 1].content.strip() if index and tokens[index - 1].type == "html_block" else ""
    not_run = match[1] if (match := NOT_RUN.fullmatch(comment)) else ""
    begin, vary = block.map[0] + 1, comment == VARY
    if block.info == "python":
        follower = tokens[index + 1] if index + 1 < len(tokens) else None
        if follower is not None and follower.type == "fence" and follower.info == "text" and follower.map:
            lines, shown = (follower.map[0] + 1, follower.map[1] - 1), follower.content
        else:
            lines, shown = (block.map[1], block.map[1]), ""
        yield Example("python", block.content, shown, begin, lines, not_run, vary)
        return
    content = block.content.splitlines(keepends=True)
    starts = [number for number, line in enumerate(content) if line.startswith("$ ")]
    for start, stop in zip(starts, [*starts[1:], len(content)], strict=True):
        end = start + 1
        while end < stop and (content[end].startswith("> ") or content[end - 1].endswith("\\\n")):
            end += 1
        code = "".join(line[2:] if line[:2] in ("$ ", "> ") else line for line in content[start:end])
        lines = (begin + end, begin + stop)
        yield Example("console", code, "".join(content[end:stop]), begin + start, lines, not_run, vary)


def commands(code: str) -> list[list[str]]:
    """Returns the arguments of each `phi3-jax` in a command of the shell."""
    found: list[list[str]] = []
    code = re.sub(r"(?<=\s)\d+(?=[<>])", "", code.replace("\\\n", " "))  # 2> is no argument
    words = shlex.shlex(code, posix=True, punctuation_chars="|&;<>()")
    words.whitespace_split, words.commenters = True, "#"
    is_argument = False
    for word in words:
        if word.rpartition("/")[2] == "phi3-jax":
            is_argument = True
            found.append([])
        elif re.fullmatch(r"[|&;<>()]+", word):
            is_argument = False
        elif is_argument:
            found[-1].append(word)
    return found


def run(page_examples: list[Example], folder: Path) -> list[str]:
    """Runs the examples in a folder, where they find the project's files, and returns what each prints.

    An example that is not run prints nothing.

    Raises:
        CellExecutionError: Python failed.
    """
    import nbformat
    from nbclient import NotebookClient

    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("build", "dist", "runs"):
            (folder / entry.name).symlink_to(entry)
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(_cell(example)) for example in page_examples]
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"})
    return [printed(cell) for cell in notebook.cells]


def _cell(example: Example) -> str:
    if example.not_run:
        return ""
    if example.language == "python":
        return example.code
    # The kernel asks for colours, which a page cannot show.
    return f"%%bash --no-raise-error\nunset FORCE_COLOR CLICOLOR_FORCE\n{{ {example.code.rstrip()}\n}} 2>&1\n"


def printed(cell: Any) -> str:
    """Returns the text that a cell printed."""
    return "".join(
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    )


def compare(shown: str, printed: str, numbers_vary: bool = False) -> None:
    """Checks that a text shows what was printed.

    Times and rates may differ, and numbers with a decimal point by 1 % or by two in their last digit.
    White space, the lines of tables and lines of progress do not count. A line `...` stands for any number of
    lines.

    Raises:
        AssertionError: they differ.
    """
    parts = [_lines(part) for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
    lines = _lines(printed)
    message = f"the page shows\n\n{shown}\nbut this was printed\n\n{printed}"

    def equal(part: list[list[str]], at: int) -> bool:
        found = lines[at : at + len(part)]
        return len(found) == len(part) and all(
            _same(a, b, numbers_vary) for a, b in zip(part, found, strict=True)
        )

    first, *middle = parts
    assert equal(first, 0), message
    at = len(first)
    if not middle:
        assert at == len(lines), message
        return
    *middle, last = middle
    for part in middle:
        begin = next((begin for begin in range(at, len(lines)) if equal(part, begin)), None)
        assert begin is not None, message
        at = begin + len(part)
    assert len(lines) - len(last) >= at, message
    assert equal(last, len(lines) - len(last)), message


def _lines(text: str) -> list[list[str]]:
    """Splits a text into lines, and these into words; empty lines and lines of progress do not count."""
    lines = (line for line in text.splitlines() if not PROGRESS.fullmatch(line.strip()))
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    """Splits a line into numbers and the texts between them, without the lines of tables."""
    return re.findall(rf"{NUMBER}|[^\s\d]+", re.sub(r"[\u2500-\u257f]", " ", line))


def _same(shown: list[str], printed: list[str], numbers_vary: bool) -> bool:
    units = [*shown[1:], ""]
    return len(shown) == len(printed) and all(
        a == b or _close(a, b, numbers_vary or unit.rstrip(".,;:)]") in UNITS)
        for a, b, unit in zip(shown, printed, units, strict=True)
    )


def _close(shown: str, printed: str, vary: bool) -> bool:
    if not (re.fullmatch(NUMBER, shown) and re.fullmatch(NUMBER, printed)):
        return False
    if vary:
        return True
    mantissa, _, exponent = shown.partition("e")
    decimals = len(mantissa.partition(".")[2])
    a, b = (float(number.replace(",", "")) for number in (shown, printed))
    step = 10.0 ** (int(exponent or 0) - decimals)
    return decimals > 0 and abs(a - b) <= max(0.01 * abs(a), 2.01 * step)


def data_files(page: Path) -> dict[str, str]:
    """Returns the files of the test data that a page uses: their names, and their places in the data."""
    text = page.read_text(encoding="utf-8")
    return {name: place for name, place in DATA.items() if name in text}


def remake(page: Path) -> None:
    """Runs a page and replaces the outputs that differ from what was printed."""
    page_examples = examples(page)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.environ.get("PHI3_JAX_TEST_DATA") or ROOT.parent / "shared" / "data")
        for name, place in data_files(page).items():
            (Path(folder) / name).symlink_to(root / place)
        outputs = run(page_examples, Path(folder))
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    for example, output in reversed(list(zip(page_examples, outputs, strict=True))):
        try:
            compare(example.shown, output, example.numbers_vary)
        except AssertionError:
            if not example.not_run and (example.language == "console" or example.shown):
                begin, end = example.lines
                new = [line.rstrip() + "\n" for line in output.splitlines()]
                lines[begin:end] = new
                print(f"{page.name}:{example.line + 1}: replaced")
            elif not example.not_run:
                print(f"{page.name}:{example.line + 1}: prints, but the page shows nothing:\n{output}")
    page.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        remake(Path(argument))
