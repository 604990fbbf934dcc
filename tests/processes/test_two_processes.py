"""Two processes on this machine: the checks of `worker.py`, and the commands with --distributed."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pair import Ended, run_pair
from reference import longrope
from small_checkpoint import PROMPT, write_checkpoint

from phi3_jax import Phi3ForCausalLM, cli
from phi3_jax.cli import common

WORKER = Path(__file__).with_name("worker.py")
FAST = (
    "every_process_has_its_shard_of_the_parameters",
    "logits_match_one_device",
    "greedy",
    "saves_what_it_loaded",
    "errors_of_process_0_reach_all",
    "reports_a_full_disk",
    "long_values_are_broadcast",
    "rejects_sizes_that_do_not_divide_before_it_reads",
)
SLOW = (
    "greedy_on_the_other_meshes",
    "sampling_and_a_seed_of_process_0",
    "beams",
    "drafts",
    "guidance",
    "int8_cache",
    "sliding_cache_slides",
    "resumes_from_a_returned_cache",
    "longrope_crosses_in_a_batch",
    "outputs_can_be_read",
    "processors_and_criteria_on_the_host",
    "process_0_decides_when_time_is_up",
    "streams_and_streamers",
    "chat_sessions",
    "a_new_head_is_divided",
)
COMMAND = ("-c", "from phi3_jax.cli import main; main()")
MESH = ("--distributed", "--mesh", "fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    changes: dict[str, dict[str, Any]] = {
        "model": {},
        "longrope": longrope() | {"max_position_embeddings": 64},
        "sliding": {"sliding_window": 6},
    }
    for name, change in changes.items():
        (folder / name).mkdir()
        write_checkpoint(folder / name, **change)
    Phi3ForCausalLM.from_pretrained(folder / "model").save_pretrained(
        folder / "expected", max_shard_size="100KB"
    )
    return folder


def run_checks(folder: Path, names: tuple[str, ...], timeout: float) -> dict[str, list[str | None]]:
    """Returns each check's error in both processes, which end after the first error."""
    tests = str(WORKER.parents[1] / "support")
    command = [WORKER, folder, *names]
    ended = run_pair(command, command, logs=folder, timeout=timeout, environment={"PYTHONPATH": tests})
    results = [json.loads((folder / f"{process}.json").read_text()) for process in (0, 1)]
    return {name: [one.get(name, f"not reached: {ended}") for one in results] for name in names}


@pytest.fixture(scope="module")
def fast_results(folder: Path) -> dict[str, list[str | None]]:
    return run_checks(folder, FAST, timeout=400)


@pytest.fixture(scope="module")
def slow_results(folder: Path) -> dict[str, list[str | None]]:
    return run_checks(folder, SLOW, timeout=1800)


@pytest.mark.parametrize("name", FAST)
def test_fast_checks(fast_results: dict[str, list[str | None]], name: str) -> None:
    assert fast_results[name] == [None, None], "\n".join(filter(None, fast_results[name]))


@pytest.mark.parametrize("name", SLOW)
def test_slow_checks(slow_results: dict[str, list[str | None]], name: str) -> None:
    assert slow_results[name] == [None, None], "\n".join(filter(None, slow_results[name]))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`alone("generate", ...)` returns the output of the command in a single process."""
    monkeypatch.setattr(common, "keep_compiled_programs", lambda cache_dir: None)

    def call(*arguments: object, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["phi3-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return call


def run_command(folder: Path, *arguments: object, timeout: float = 150, stdin: str = "") -> list[Ended]:
    cache = {"PHI3_JAX_CACHE": str(folder / "cache")}
    command = [*COMMAND, *arguments]
    return run_pair(command, command, logs=folder, timeout=timeout, stdin=stdin, environment=cache)


# Messages that Gloo's threads write into one another's lines.
GLOO = (
    r"\[Gloo\] Rank |\d* ?is connected to \d*|peer ranks\. |Expected number of connected peer ranks is : ?\d*"
)


def messages(ended: Ended) -> str:
    """Returns standard error without Gloo's messages."""
    lines = re.sub(GLOO, "", ended.err).splitlines(True)
    return "".join(line for line in lines if line.strip() and not line.strip().isdigit())


def test_generate_prints_in_process_0_as_it_does_alone(folder: Path, alone: Any) -> None:
    arguments = ("generate", "--model", folder / "model", "--dtype", "float32", "--max-new-tokens", 12)
    first, second = run_command(folder, *arguments, *MESH, stdin=PROMPT)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out == alone(*arguments, stdin=PROMPT)
    assert messages(first).startswith("[") and " tokens after" not in messages(first)  # noqa: PT018
    assert second.out == messages(second) == ""


def test_process_0_holds_the_conversation(folder: Path, alone: Any, tmp_path: Path) -> None:
    lines = [
        PROMPT,
        f"/save {tmp_path / 'saved.json'}",
        "And why?",
        "/reset",
        f"/load {tmp_path / 'saved.json'}",
        "Yes?",
    ]
    arguments = ("chat", "--model", folder / "model", "--dtype", "float32", "--max-new-tokens", 9)
    stdin = "".join(f"{line}\n" for line in lines)
    expected = alone(*arguments, stdin=stdin)
    (tmp_path / "saved.json").unlink()
    first, second = run_command(folder, *arguments, *MESH, stdin=stdin)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out == expected
    assert second.out == messages(second) == ""
    assert (tmp_path / "saved.json").exists()

    first, second = run_command(folder, *arguments, *MESH, stdin=f"/load {tmp_path / 'none.json'}\n")
    assert (first.code, second.code) == (1, 1), (first, second)
    assert "none.json" in messages(first)
    assert messages(first).count("\n") == 1
    assert second.out == messages(second) == ""


def test_beams_and_samples_of_the_command(folder: Path, alone: Any) -> None:
    arguments = ("generate", PROMPT, "--model", folder / "model", "--dtype", "float32", "--max-new-tokens", 9)
    for options in (("--num-beams", 2), ("--temperature", 2, "--seed", 7)):
        first, second = run_command(folder, *arguments, *options, *MESH)
        assert first.out == alone(*arguments, *options), first
        assert second.out == messages(second) == ""


def test_convert_and_bench(folder: Path, alone: Any) -> None:
    first, second = run_command(folder, "convert", folder / "model", folder / "converted", "--distributed")
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out.startswith(f"{folder / 'converted'}: ")
    assert second.out == messages(second) == ""
    weights = [path / "model.safetensors" for path in (folder / "converted", folder / "model")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    arguments = ("--model", folder / "model", "--new-tokens", 3, "--prompt-tokens", 8, "--rounds", 2)
    first, second = run_command(folder, "bench", *arguments, *MESH)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "decode, tokens/s" in first.out
    assert second.out == messages(second) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "fsdp=3"), "needs 3 devices and there are 4;"),
        ((), "needs --mesh"),
        (("--mesh", "tensor=4"), "num_key_value_heads=2 does not divide over tensor=4; use tensor=1, 2"),
    ],
)
def test_reports_errors_in_one_line_of_process_0(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    arguments = ("generate", PROMPT, "--model", folder / "model", "--distributed", *options)
    first, second = run_command(folder, *arguments)
    assert (first.code, second.code) == (1, 1)
    assert message in messages(first)
    assert messages(first).count("\n") == 1
    assert second.out == ""


def test_a_file_missing_in_one_process_ends_both(folder: Path) -> None:
    commands = [
        [*COMMAND, "generate", PROMPT, "--model", folder / name, *MESH] for name in ("model", "absent")
    ]
    ended = run_pair(*commands, logs=folder, timeout=150)
    assert [one.code for one in ended] == [1, 1]
    assert "(in process 1)" in messages(ended[0])
    assert "phi3-jax (process 1): " in messages(ended[1])
    assert all(messages(one).count("\n") == 1 for one in ended)
