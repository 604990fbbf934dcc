"""Reports of `phi3-jax rope retrieve`: tables, averages, ties and failures."""

import csv
import json
from dataclasses import replace
from pathlib import Path

from phi3_jax.rope_lab.retrieval.measure import Trial
from phi3_jax.rope_lab.retrieval.report import LISTED, table, write_retrieval_report
from phi3_jax.rope_lab.retrieval.run import RetrievalResult
from phi3_jax.rope_lab.retrieval.tasks import PassKey, make_tasks

OPTIONS = {"trials": 3}


def trial(rope: str, length: int, number: int, answer: str) -> Trial:
    score = PassKey().score(["71432"], answer)
    return Trial(rope, "passkey", length, 0.5, number, ("71432",), answer, score)


def test_report(tmp_path: Path) -> None:
    answers = {
        ("a|b", 100): ["71432", "no <idea>\n|", "71432"],
        ("c", 100): ["71432", "71432", "12341 71432"],
        ("a|b", 200): ["71432", "71432", "71432"],
        ("c", 200): ["71432"] * 3,
        ("d", 100): ["x" * 400, "", ""],
        ("d", 200): [""] * 3,
    }
    trials = [
        trial(*cell, number, text) for cell, texts in answers.items() for number, text in enumerate(texts)
    ]
    write_retrieval_report(tmp_path, RetrievalResult(trials, [PassKey()], OPTIONS, 18, 1.0))
    with (tmp_path / "retrieval.csv").open() as file:
        rows = {(row["rope"], row["length"]): row for row in csv.DictReader(file)}
    assert (rows["a|b", "100"]["trials"], rows["d", "100"]["score"]) == ("3", "0.0")
    content = json.loads((tmp_path / "retrieval.json").read_text())
    assert [Trial(**each | {"answers": tuple(each["answers"])}) for each in content["trials"]] == trials
    assert (tmp_path / "retrieval.png").stat().st_size > 5_000
    report = (tmp_path / "report.md").read_text()
    assert "| a\\|b | 67% | 100% | 83% |" in report
    assert "- passkey, 100 tokens, a|b and c: 67% each, but not by the same answers:" in report
    assert '| 50% | 71432 | "no &lt;idea>\\n\\|" | "71432" |' in report
    assert "- passkey, 200 tokens, a|b and c: 100% each, on each prompt." in report
    assert '| passkey | 100 | 50% | 71432 | "12341 71432" | 0 of 1, more after other values |' in report
    assert "### d: 6 of 6" in report
    assert f'"{"x" * 159}…"' in report

    many = [replace(trials[0], rope="e", trial=number, text="", score=0.0) for number in range(LISTED + 5)]
    write_retrieval_report(tmp_path, RetrievalResult(many, [PassKey()], OPTIONS, 18, 1.0))
    assert "And 5 more, in retrieval.json." in (tmp_path / "report.md").read_text()


def test_report_of_several_tasks(tmp_path: Path) -> None:
    tasks = make_tasks(["passkey", "multi-value"], keys=2)
    values, scores = ("11111", "22222"), {"a": (1.0, 0.5), "b": (0.0, 1.0)}
    trials = [
        Trial(rope, task.name, length, depth, 0, values, "11111", score)
        for task in tasks
        for length in (100, 200)
        for rope, each in scores.items()
        for depth in ([0.0, 1.0] if task.has_depth else [None])
        for score in [each[task.name == "multi-value"]]
    ]
    result = RetrievalResult(trials, tasks, OPTIONS, 0, 0.0)
    write_retrieval_report(tmp_path, result)
    report = (tmp_path / "report.md").read_text()
    average = report[report.index("## Average") : report.index("## passkey")]
    assert "| a | 75% | 75% | 75% |" in average
    assert "| b | 50% | 50% | 50% |" in average
    assert "## multi-value keys=2\n\nOne word has several numbers" in report
    assert "### passkey, b\n\n| depth | 100 | 200 |" in report
    assert "### multi-value, b" not in report
    assert '| multi-value | 200 |  | 11111, 22222 | "11111" | 1 of 2 |' in report
    with (tmp_path / "retrieval.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (2 + 1)
    assert {row["depth"] for row in rows if row["task"] == "multi-value"} == {""}
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert list(table(result).columns[0].cells) == [
        "passkey",
        "passkey",
        "multi-value",
        "multi-value",
        "average",
        "average",
    ]
