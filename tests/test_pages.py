"""Runs the examples of README and of the pages, and compares what they print with what the pages show."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
import pytest
import typer
from markdown_it import MarkdownIt

from phi3_jax import CheckpointError
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.cli.app import app

NAMES = [str(page.relative_to(pages.ROOT)) for page in pages.PAGES]
RUNS = [
    name
    for name, page in zip(NAMES, pages.PAGES, strict=True)
    if any(not example.not_run for example in pages.examples(page))
]
COMMANDS = [
    pytest.param(arguments, id=f"{name}:{example.line + 1}")
    for name, page in zip(NAMES, pages.PAGES, strict=True)
    for example in pages.examples(page)
    if example.language == "console"
    for arguments in pages.commands(example.code)
]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.live
@pytest.mark.parametrize("name", RUNS)
def test_page_shows_what_its_examples_print(
    name: str, shared_data: Callable[..., Path], tmp_path: Path
) -> None:
    """The examples of a page run from the top to the bottom as a user runs them."""
    try:
        default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is not available: {error}")
    page = pages.ROOT / name
    for file, place in pages.data_files(page).items():
        (tmp_path / file).symlink_to(shared_data(*place.split("/")).resolve())
    examples = pages.examples(page)
    for example, printed in zip(examples, pages.run(examples, tmp_path), strict=True):
        if not example.not_run:
            pages.compare(example.shown, printed, example.numbers_vary)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_accepts_options_of_documented_command(arguments: list[str]) -> None:
    """Commands that tests do not run have options that exist, too."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("phi3-jax", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def test_commands_without_redirections() -> None:
    code = "cat a | phi3-jax batch --input - --top-k 2 \\\n  --output - 2> /dev/null; phi3-jax chat 2>&1\n"
    assert pages.commands(code) == [["batch", "--input", "-", "--top-k", "2", "--output", "-"], ["chat"]]


@pytest.mark.parametrize("name", NAMES)
def test_page_has_known_blocks_only(name: str) -> None:
    """Each block of code has a language, and all Python and commands are where these tests find them."""
    tokens = MarkdownIt("commonmark").parse((pages.ROOT / name).read_text(encoding="utf-8"))
    assert not [token.map for token in tokens if token.type == "code_block"], "indented code"
    languages = {token.info for token in tokens if token.type == "fence"}
    assert languages <= {"python", "console", "text", "sh", "json", "yaml", "{toctree}"}
    for token in tokens:
        if token.type == "fence" and token.info == "sh":
            assert not re.search(r"^\s*\$ ", token.content, re.MULTILINE)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a b\n", "a   b"),
        ("a\n...\n", "a\nb\nc"),
        ("a\n...\nd", "a\nb\nc\nd"),
        ("...\nd", "d\nb\nd"),
        ("...\n", ""),
        ("loss 0.26, 37 tokens", "loss 0.28, 37 tokens"),
        ("loss 104.0", "loss 104.9"),
        ("in 2.1 s, 28 tokens/s", "in 10.7 s, 3.5 tokens/s"),
        ("│ a │ 1 │", "a     1"),
        ("a\nb", "a\n256 of 768 tokens, 33%\nstep 3/9, loss 0.533, 0:00:09 left\nb"),
        ("a\nb", "a\n1/2 lines, 3 tokens/s in, 1 of 48 slots, 50%, 0:00:14 left\nb"),
        ("a\nb", "none at 1,024, window 10 of 12, 481 tokens/s, 67%, 0:00:05 left\na\nb"),
    ],
)
def test_compare_accepts(shown: str, printed: str) -> None:
    pages.compare(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a", "b"),
        ("a", "a\nb"),
        ("a\nb", "a"),
        ("", "a"),
        ("a", ""),
        ("a\n...\nd", "a\nb\nc"),
        ("a\n...\nd", "a\nd\ne"),
        ("a\n...\na", "a"),
        ("loss 0.26", "loss 0.29"),
        ("loss 104.0", "loss 105.9"),
        ("37 tokens", "38 tokens"),
        ("37 tokens", "tokens"),
        ("1.5", "text"),
        ("a", "a\nnone 100% 50%"),
        ("a", "a\ntest: accuracy 33%"),
    ],
)
def test_compare_rejects(shown: str, printed: str) -> None:
    with pytest.raises(AssertionError):
        pages.compare(shown, printed)


def test_compare_with_numbers_that_vary() -> None:
    pages.compare("a 1 2.5", "a 7 0.1", numbers_vary=True)
    with pytest.raises(AssertionError):
        pages.compare("a 1 2.5", "b 7 0.1", numbers_vary=True)


def test_readme_is_one_page() -> None:
    assert len((pages.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
