"""`phi3-jax bench-input`: the stages of the host, their table, and what cannot be measured."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Result
from phi3_jax.train import bench_input

from phi3_jax import cli
from phi3_jax.bench.turns import take_turns_here


@pytest.fixture
def bench(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`bench(*options)` runs the command in this process, whose cores stay as they are.

    Returns the result, and the number of cores of each side.
    """
    cores: list[int] = []
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(bench_input, "take_turns", take_turns_here)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 2, 9}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, own: cores.append(len(own)), raising=False)

    def call(*options: object) -> tuple[Result, list[int]]:
        cores.clear()
        arguments = ["phi3-jax", "bench-input", "--model", base, "--rounds", 1, *options]
        monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr()), list(cores)

    return call


def numbers(table: str) -> dict[str, list[int]]:
    """Returns the numbers of each line of a table."""
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in table.splitlines() if line.startswith("│")]
    return {name: [int(cell.replace(",", "")) for cell in cells] for name, *cells in lines}


@pytest.mark.parametrize("kind", ["generated", "texts", "pairs", "words"])
def test_measures_each_stage_on_one_core_and_on_several(bench: Any, tmp_path: Path, kind: str) -> None:
    rows = [{"a": f"text {n}", "b": "its pair", "words": ["one", "two"], "c": "xy"[n % 2]} for n in range(30)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, list[object]] = {
        "generated": ["--rows", 20],
        "texts": ["--input", source, "--rows", 20, "--text-column", "a", "--label-column", "c"],
        "pairs": ["--input", source, "--rows", 20, "--text-column", "a", "--text-pair-column", "b"],
        "words": ["--input", source, "--rows", 20, "--task", "token-classification"],
    }
    result, cores = bench(*options[kind], "--cores", 2, "--batch-size", 4)
    assert result.code == 0, result.err
    assert cores == [1, 2]
    title = r"(generated|rows)\S*, 20 rows of \d+\.\d tokens, tokenizer of model, median of 1"
    assert re.search(title, result.out)
    table = numbers(result.out)
    assert tuple(table) == bench_input.STAGES
    for one, one_tokens, two, two_tokens in table.values():
        assert 0 < one < one_tokens
        assert 0 < two < two_tokens


def test_generated_words_are_a_file(bench: Any) -> None:
    result, cores = bench("--rows", 10, "--task", "token-classification", "--cores", 1)
    assert result.code == 0, result.err
    assert cores == [1]
    assert len(numbers(result.out)["read"]) == 2


def test_rejects_what_cannot_be_measured(bench: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("text\na\n \n")
    for options, message in (
        (["--cores", 4], "--cores 4, and this process may use 3; use 3 or fewer"),
        (["--label-column", "x"], "--label-column is of a file; add --input"),
        (["--input", source], "rows.csv, line 3: 'text' is empty"),
        (["--input", source, "--text-column", "x"], "has no column 'x'"),
    ):
        result, _ = bench(*options)
        assert result.code == 1
        assert message in result.err
