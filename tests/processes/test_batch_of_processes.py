"""`phi3-jax batch` in two processes: it divides the lines and combines the answers."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from pair import run_pair
from small_checkpoint import write_checkpoint
from stores import open_store

from phi3_jax.cli import main
from phi3_jax.storage.targets import local_target, read_bytes
from phi3_jax.storage.urls import list_entries

COMMAND = ("-c", "from phi3_jax.cli import main; main()", "batch")


def answers(content: bytes) -> dict[int, str]:
    lines = [json.loads(line) for line in content.splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line.get("text", "error") for line in lines}


@pytest.mark.parametrize("kind", ["local", "gs"])
def test_divides_lines_and_combines_answers(tmp_path: Path, kind: str) -> None:
    """Also without a common disk for the answers."""
    with ExitStack() as stack:
        folder = str(tmp_path)
        if kind == "gs":
            folder = stack.enter_context(open_store(kind)).empty_folder().url
        check_two_processes(tmp_path, folder)


def check_two_processes(tmp_path: Path, folder: str) -> None:
    model, source = tmp_path / "model", tmp_path / "in.jsonl"
    model.mkdir()
    write_checkpoint(model)
    lines = [{"id": number, "prompt": "abcdefgh"[: 1 + number % 8]} for number in range(31)]
    lines.append({"id": 3, "prompt": "x"})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = ["--model", model, "--input", source, "--dtype", "float32", "--max-new-tokens", 12, "--slots", 4]
    with pytest.raises(SystemExit, match="3"):
        run_main(*own, "--output", tmp_path / "alone.jsonl")
    expected = answers((tmp_path / "alone.jsonl").read_bytes())
    assert len(expected) == 32

    output = f"{folder}/both.jsonl"
    command = [*COMMAND, *own, "--output", output, "--distributed", "--mesh", "data=2"]
    environment = {"PHI3_JAX_CACHE": str(tmp_path / "cache")}
    ended = run_pair(command, command, logs=tmp_path, timeout=300, environment=environment)
    assert [one.code for one in ended] == [3, 3], ended
    assert answers(read_bytes(output)) == expected
    assert "32 lines, 1 of them errors; 32 in " in ended[0].err
    assert "32 lines" not in ended[1].err
    if local_target(folder) is None:
        names = {entry.name for each in (folder, f"{output}.partial") for entry in list_entries(each)}
    else:
        names = {path.name for path in tmp_path.iterdir() if "both" in path.name}
    assert names == {"both.jsonl", "both.jsonl.run.json"}

    ended = run_pair(command, command, logs=tmp_path, timeout=300, environment=environment)
    assert [one.code for one in ended] == [3, 3], ended
    assert "is finished; nothing is left to do" in ended[0].err


def run_main(*arguments: object) -> None:
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["phi3-jax", "batch", *map(str, arguments)]):
        main()
