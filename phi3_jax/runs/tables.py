"""Tables in Markdown."""

from collections.abc import Iterable, Iterator, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a table; its cells may have any text."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |"

    yield line(head)
    yield line("---" for _ in head)
    for row in rows:
        yield line(" ".join(cell.split()) for cell in row)
