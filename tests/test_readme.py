"""Runs the Python examples of the README unchanged on a tiny model, and some on the real one."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from reference import small_config, write_random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.config.rope_types import ROPE_TYPES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


class Example(NamedTuple):
    code: str
    printed: str
    """The output that README shows; empty if it shows none."""


def examples() -> list[Example]:
    """Returns the blocks of Python, and the indented lines after each block that prints."""
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n((?: {4}[^\n]*\n)+))?", README, re.MULTILINE | re.DOTALL)
    return [
        Example(code, re.sub(r"^ {4}", "", printed, flags=re.MULTILINE) if "print(" in code else "")
        for code, printed in found
    ]


EXAMPLES = examples()
PRINTING = [number for number, example in enumerate(EXAMPLES) if example.printed]


def run(number: int, names: dict[str, Any]) -> None:
    exec(compile(EXAMPLES[number].code, f"README example {number}", "exec"), names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a tiny model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = {token: i for i, token in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = {"pad_token": "<pad>", "padding_side": "left", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"vocab_size": len(alphabet), "max_position_embeddings": 2048, "num_hidden_layers": 1}
    write_random_model("causal", small_config(pad_token_id=0, **sizes), folder)
    return folder


@pytest.fixture
def names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Returns the names that the examples assume, and runs them in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    names = {
        "path": folder,
        "model": Phi3ForCausalLM.from_pretrained(folder),
        "tokenizer": Phi3Tokenizer.from_pretrained(folder),
        "text": "All happy families are alike. " * 40,
        "batch_size": 2,
        "prompt_ids": np.full((2, 5), 7),
        "ids": np.full((2, 5), 7),
        "np": np,
    }
    with patch.dict(ROPE_TYPES):
        yield names


FORMS = {
    r"\((\d+), \d+, \d+\)": r"\(\1, \\d+, \\d+\)",  # the same number of rows
    r"(['\"]).*\1": r"(?:'.*'|\".*\")",  # the repr of a text
    r"(\d+)  ?\D.*": r"\1 .*",  # the id of an answer, and the answer
    r"(?:\d+\.\d{3} ?)+": None,  # the same number of numbers and digits
}


def form(line: str) -> str:
    """Returns a pattern for the line that another model prints instead of this line of README."""
    for shown, pattern in FORMS.items():
        if match := re.fullmatch(shown, line):
            return match.expand(pattern) if pattern else " ".join([r"\d+\.\d{3}"] * len(line.split()))
    raise AssertionError(f"add a form for the line {line!r}")


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_runs_example(number: int, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The example runs, and prints the same number of things of the same kind as README shows."""
    run(number, names)
    printed = capsys.readouterr().out
    if expected := EXAMPLES[number].printed:
        pattern = r"\s*\n".join(map(form, expected.splitlines()))
        assert re.fullmatch(pattern + r"\s*", printed, re.DOTALL), printed
    if number == example_with("no_token_twice_in_a_row"):
        answers = np.asarray(names["out"])[:, names["ids"].shape[1] - 1 :]
        assert (answers[:, 1:] != answers[:, :-1]).all()
    if number == example_with("nnx.Optimizer") or number == example_with("Trainer("):
        losses = [float(loss) for loss in printed.split()]
        assert losses == sorted(losses, reverse=True)


def example_with(text: str) -> int:
    (number,) = (number for number, example in enumerate(EXAMPLES) if text in example.code)
    return number


def test_finds_every_example() -> None:
    """All Python of the README is in blocks that these tests run."""
    openings = re.findall(r"^ *[`~]{3,} *(\S*)", README, re.MULTILINE)[::2]
    assert openings == ["python"] * len(EXAMPLES)
    assert not re.findall(r"^ {4}(?:>>> |from \S+ import |import )", README, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.optimized
def test_real_model_prints_what_readme_shows(
    shared_data: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SmolLM2 gives the answers of README; losses match to the second last digit."""
    try:
        path = default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is not available: {error}")
    monkeypatch.chdir(tmp_path)
    text = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")[:8000]
    names: dict[str, Any] = {"path": path, "text": text, "np": np}
    for number in PRINTING:
        run(number, names)
        printed, expected = capsys.readouterr().out, EXAMPLES[number].printed
        if re.fullmatch(r"[\d. \n]+", expected):
            numbers, shown = ([float(each) for each in out.split()] for out in (printed, expected))
            assert numbers == pytest.approx(shown, abs=0.02)
        else:
            lines, shown_lines = ([line.rstrip() for line in out.splitlines()] for out in (printed, expected))
            assert lines == shown_lines
