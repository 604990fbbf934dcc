"""The examples of a run: the same rope frequencies in a packed row, and the columns that are found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phi3_jax.train.sources import Data, load_data, make_task
from runs import settings_of, write_base, write_rows

from phi3_jax import Phi3Config
from phi3_jax.data.packing import PackedExamples
from phi3_jax.data.tasks import Task
from phi3_jax.tokenizer import Phi3Tokenizer

SWITCH = 20
"""Tokens up to which the first list counts; some examples are longer."""


def packed(folder: Path, rope: dict[str, Any], max_length: int = 96) -> Data:
    write_rows(folder / "train.jsonl", 24, "causal-lm")
    sizes = {"max_position_embeddings": 4 * SWITCH, "original_max_position_embeddings": SWITCH}
    base = write_base(folder / "base", **sizes)
    config = Phi3Config.from_pretrained(base).replace(rope_scaling=rope)
    task = {"task": "causal-lm", "messages_column": "messages"}
    settings = settings_of(folder, base, packing=True, max_length=max_length, **task)
    return load_data(settings, Phi3Tokenizer.from_pretrained(base), config)


@pytest.mark.parametrize("rope_type", ["longrope", "yarn"])
def test_a_packed_row_has_one_list(tmp_path: Path, rope_type: str) -> None:
    lists = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    train = packed(tmp_path, {"type": rope_type, **lists}).train
    assert isinstance(train, PackedExamples)
    needs_long = train.examples.lengths > SWITCH
    assert 0 < np.count_nonzero(needs_long) < len(needs_long)
    assert max(len(row) for row in train.rows) > 1
    for row in train.rows:
        assert len(set(needs_long[row])) == 1


def test_packing_rejects_other_ropes_that_depend_on_the_length(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    with pytest.raises(ValueError, match=r"those of 'dynamic' change with .* max_length=96; set packing to"):
        packed(tmp_path, dynamic)


def test_packs_where_the_rope_does_not_change_yet(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert isinstance(packed(tmp_path, dynamic, max_length=4 * SWITCH).train, PackedExamples)


def chat_task(folder: Path, row: dict[str, Any]) -> Task:
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return make_task(settings_of(folder, folder, task="causal-lm"), Phi3Config())


def test_finds_the_column_of_conversations(tmp_path: Path) -> None:
    for name in ("messages", "conversations"):
        assert chat_task(tmp_path, {"id": 1, name: [{}]}).columns == (name,)
    for row in ({"text": "a", "messages": [{}]}, {"messages": "a"}):
        assert chat_task(tmp_path, row).columns == ("text",)
    with pytest.raises(
        ValueError, match=r"line 1: prompt and completion are not read; write messages, as in"
    ):
        chat_task(tmp_path, {"prompt": "a", "completion": "b"})


def test_reads_the_files_of_a_folder_by_split(tmp_path: Path) -> None:
    """The examples are those of the files by name, in the order of the names."""
    folder = tmp_path / "rows"
    folder.mkdir()
    parts = [folder / f"train-{number:05}-of-00002.jsonl" for number in (1, 0)]
    for number, path in enumerate([*parts, folder / "test.jsonl"]):
        write_rows(path, 6, start=10 * number)
    base = write_base(tmp_path / "base")
    tokenizer, config = Phi3Tokenizer.from_pretrained(base), Phi3Config.from_pretrained(base)

    def load(train: Any, test: Any) -> Data:
        return load_data(settings_of(tmp_path, base, train_file=train, test_file=test), tokenizer, config)

    by_name = load([str(path) for path in sorted(parts)], str(folder / "test.jsonl"))
    assert load(str(folder), str(folder)).fingerprint() == by_name.fingerprint()
