"""Logs before and after a kill, TensorBoard's included; progress on a terminal and elsewhere."""

import json
import math
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phi3_jax.train import progress
from phi3_jax.train.logs import RunLog, read_log
from phi3_jax.train.progress import Progress
from phi3_jax.train.time_left import TimeLeft
from tensorboardX.proto.event_pb2 import Event


def events(path: Path) -> list[Event]:
    """Returns the events of a file: each has 12 bytes before it (length, checksum) and 4 after it."""
    data, offset, parsed = path.read_bytes(), 0, []
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        parsed.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
        offset += length + 16
    return parsed


def write(directory: Path, steps: range, resume_at: int) -> None:
    with RunLog(directory, resume_at=resume_at) as log:
        for step in steps:
            log.record("train", step, {"loss": 1 / step})


def steps_of(directory: Path) -> list[int]:
    return [record["step"] for record in read_log(directory / "log.jsonl")]


def test_reads_floats_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        f"v{n}": value for n, value in enumerate(rng.normal(size=50) * 10.0 ** -np.arange(50))
    }
    values |= {"single": np.float32(0.1), "small": 5e-324, "minus": -0.0, "whole": 3}
    values |= {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}
    with RunLog(tmp_path, resume_at=0) as log:
        log.record("validation", 7, values)
    (record,) = read_log(tmp_path / "log.jsonl")
    assert (record.pop("kind"), record.pop("step")) == ("validation", 7)
    assert [struct.pack("d", record[name]) for name in values] == [
        struct.pack("d", v) for v in values.values()
    ]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)


def test_records_are_readable_before_the_log_is_closed(tmp_path: Path) -> None:
    threads = threading.active_count()
    with RunLog(tmp_path / "run", resume_at=0) as log:
        log.record("train", 1, {"loss": 2.0})
        log.record("test", 1, {"accuracy": 0.5, "loss": 1.0})
        assert read_log(tmp_path / "run" / "log.jsonl") == [
            {"kind": "train", "step": 1, "loss": 2.0},
            {"kind": "test", "step": 1, "accuracy": 0.5, "loss": 1.0},
        ]
        (file,) = (tmp_path / "run" / "tensorboard").iterdir()
        scalars = [(e.step, value.tag, value.simple_value) for e in events(file) for value in e.summary.value]
        assert scalars == [(1, "train/loss", 2.0), (1, "test/accuracy", 0.5), (1, "test/loss", 1.0)]
        assert events(file)[0].file_version == "brain.Event:2"
        assert file.name.startswith("events.out.tfevents.")
        assert threading.active_count() == threads
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "tensorboard"]


def test_a_resumed_log_continues_after_its_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9), 0)
    kept = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)[:5]
    write(tmp_path, range(6, 8), 5)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "log.jsonl").read_bytes().startswith(b"".join(kept))
    older, newer = sorted((tmp_path / "tensorboard").iterdir())
    assert [e.step for e in events(older) if e.summary.value] == list(range(1, 9))
    assert [e.step for e in events(newer) if e.summary.value] == [6, 7]
    started = [e for e in events(newer) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in started] == [(6, started[0].session_log.START)]


def test_a_log_from_step_0_replaces_an_old_one(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9), 0)
    write(tmp_path, range(1, 3), 0)
    assert steps_of(tmp_path) == [1, 2]
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert not any(e.HasField("session_log") for e in events(file))


@pytest.mark.parametrize("lost", [1, 2, 20, 34])
def test_drops_an_incomplete_last_line(tmp_path: Path, lost: int) -> None:
    write(tmp_path, range(1, 5), 0)
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    whole = [1, 2, 3, 4] if lost == 1 else [1, 2, 3]  # only the line break is missing
    assert steps_of(tmp_path) == whole
    write(tmp_path, range(5, 6), 4)
    assert steps_of(tmp_path) == [*whole, 5]


@pytest.mark.parametrize("broken", [b'{"kind": "train", "st', b"[1, 2]", b'{"kind": "train"}', b"\xff\x00"])
def test_rejects_a_broken_line_before_the_last(tmp_path: Path, broken: bytes) -> None:
    write(tmp_path, range(1, 5), 0)
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], broken, *lines[3:]]) + b"\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"log\.jsonl, line 3 is not a record of a run: .*; repair"):
        RunLog(tmp_path, resume_at=4)
    with pytest.raises(ValueError, match="line 3"):
        read_log(path)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.jsonl", "tensorboard"]


def test_resuming_without_a_log_starts_one(tmp_path: Path) -> None:
    write(tmp_path, range(11, 13), 10)
    assert steps_of(tmp_path) == [11, 12]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def test_prints_a_line_now_and_then_without_a_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(1200, start=200, show=True) as shown:
        for step in range(201, 226):
            clock.now += 1
            speed = {
                "tokens_per_second": 12345.6,
                "flops_per_second": 2.5e12,
                "mfu": None if step < 215 else 0.412,
                "input_wait": 0.04 if step < 221 else 0.125,
            }
            shown.update(step, {"loss": 1 / step, **speed}, 1200.0 - step)
            if step == 212:
                shown.update(step, {"accuracy": 0.875})
                shown.say("step 212: [saved]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 210/1,200, loss 0.004762, 12,346 tokens/s, 2.5 TFLOP/s, 0:00:10 elapsed, 0:16:30 left",
        "step 212: [saved]",
        "step 220/1,200, loss 0.004545, accuracy 0.875, 12,346 tokens/s, 2.5 TFLOP/s, MFU 41.2%, "
        "0:00:20 elapsed, 0:16:20 left",
        "step 225/1,200, loss 0.004444, accuracy 0.875, 12,346 tokens/s, 2.5 TFLOP/s, MFU 41.2%, "
        "12% waiting for batches, 0:00:25 elapsed, 0:16:15 left",
    ]


def test_the_time_left_counts_down_between_updates(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(9, start=0, show=True) as shown:
        shown.update(1, {"loss": 1.0}, 100.0)
        clock.now += 60
        shown.update(2, {"loss": 0.5})
    assert capsys.readouterr().err.splitlines() == ["step 2/9, loss 0.5, 0:01:00 elapsed, 0:00:40 left"]


def simulate(steps: int, every: int, widths: int, evaluation: float, guess: float) -> dict[int, float]:
    """Returns the estimates after each step of a run, relative to the time that is really left.

    A step takes 2 seconds more or less, the compilation of a width 30, and that of an evaluation's 10. Two
    evaluations follow the steps.
    """
    rng = np.random.default_rng(0)
    left, new = TimeLeft(guess), {round(steps * share): 1 for share in np.linspace(0, 0.7, widths)}
    durations: list[float] = []
    estimates: dict[int, float] = {}
    seen = 0
    for step in range(steps):
        seconds = float(rng.uniform(1, 3))
        durations.append(seconds + 30 * new.get(step, 0))
        left.add_step(durations[-1], new.get(step, 0))
        seen += new.get(step, 0)
        done = step + 1
        evaluated = done // every
        if done % every == 0:
            durations[-1] += evaluation + 10 * (evaluated == 1)
            left.add_evaluation(evaluation + 10 * (evaluated == 1), int(evaluated == 1))
        estimate = left.seconds(
            steps - done, steps // every - evaluated + 2, widths - seen, 0 if evaluated else 1
        )
        if estimate is not None:
            estimates[done] = estimate
    total = sum(durations) + 2 * evaluation
    passed = np.cumsum(durations)
    return {step: estimate / (total - passed[step - 1]) for step, estimate in estimates.items()}


@pytest.mark.parametrize(
    ("steps", "every", "widths", "evaluation", "guess"),
    [(189, 63, 6, 60.0, 24.0), (60, 60, 4, 20.0, 10.0), (400, 10, 1, 15.0, 5.0), (1000, 500, 6, 3.0, 1.0)],
)
def test_the_time_left_is_right_within_30_percent_after_a_tenth(
    steps: int, every: int, widths: int, evaluation: float, guess: float
) -> None:
    ratios = simulate(steps, every, widths, evaluation, guess)
    late = [ratio for step, ratio in ratios.items() if step >= steps / 10]
    assert len(late) > 0.85 * steps
    assert 0.7 < min(late) <= max(late) < 1.3


def test_there_is_no_estimate_before_a_step_without_compilation() -> None:
    left = TimeLeft(3.0)
    left.add_step(60.0, 2)
    assert left.seconds(9, 1) is None
    left.add_step(1.0, 0)
    assert left.seconds(8, 1, widths=2, evaluation_widths=3) == pytest.approx(8 + 3 + 3 * 29.5)
    assert left.seconds(0, 0) == 0


def test_prints_the_last_step_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, start=0, show=True) as shown:
        shown.update(1, {"loss": 1.0})
        clock.now += 11
        shown.update(2, {"loss": 0.5}, 0.0)
    assert capsys.readouterr().err.splitlines() == ["step 2/2, loss 0.5, 0:00:11 elapsed, 0:00:00 left"]


@pytest.mark.parametrize("terminal", [False, True])
def test_shows_nothing_unless_asked_to(
    terminal: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(10, start=0, show=False) as shown:
        clock.now += 60
        shown.update(5, {"loss": 1.0})
        shown.say("half")
    assert capsys.readouterr() == ("", "")


def test_shows_a_bar_with_lines_above_it_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    threads = set(threading.enumerate())
    with Progress(1000, start=0, show=True) as shown:
        shown.update(500, {"loss": 1.25, "macro_f1": 0.5, "mfu": 0.3})
        shown.say("validated [bold]half[/bold]")
        shown.update(750, {"loss": 1.0})
    err = capsys.readouterr().err
    assert "validated [bold]half[/bold]" in err
    assert "step 750/1,000" in err
    assert "━" in err
    assert "loss 1  macro_f1 0.5  MFU 30.0%" in err
    assert "elapsed" in err
    for thread in set(threading.enumerate()) - threads:  # they end with the block
        thread.join(timeout=5)
        assert not thread.is_alive()
