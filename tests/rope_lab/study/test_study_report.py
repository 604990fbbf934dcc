"""The report of a study: tables, figures and results that another study reads."""

import json
from pathlib import Path

import pytest
from studies import study_results

from phi3_jax.rope_lab.study.report import FILES, read_results, write_study_report

PNG = b"\x89PNG\r\n\x1a\n"


def test_writes_tables_figures_and_results(tmp_path: Path) -> None:
    results = study_results({("linear", "none"): (90.0, 80.0, 100.0, float("inf"))})
    write_study_report(tmp_path, results)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) - {"beside.png"}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(PNG)
    report = (tmp_path / "report.md").read_text()
    for line in (
        "# Ropes from 512 to 4,096 tokens",
        "| NTK-aware scaling works without training | confirmed | ntk 28.00, plain 1,000.00; base 20.00",
        "Of 4,095 tokens of the test part",
        "| rope | training | 256 | 512 | 2,048 | 4,096 |",
        "| searched | trained: all parameters | 22.00 | 20.10 | 19.00 | 18.80 |",
        "| passkey | yarn | trained: all parameters | 18 (90%) | 18 (90%) |",
        "| linear | untrained | 4.091 | 4.000 |",
        "| base model | trained: all parameters | 2,000 | 1,800 | 3.1000 | 3.2000 |",
        "| yarn | yarn:factor=8 | 1.2000 |",
    ):
        assert line in report
    assert read_results(tmp_path) == results


def test_shows_other_studies_beside(tmp_path: Path) -> None:
    other = study_results({("linear", "none"): (), ("linear", "full"): ()}, name="other", original=256)
    write_study_report(tmp_path, study_results(), [other])
    assert (tmp_path / "beside.png").read_bytes().startswith(PNG)
    report = (tmp_path / "report.md").read_text()
    assert (
        "| study | rope | training | 0.5 times | 1 times | 2 times | 4 times | 8 times | 16 times |" in report
    )
    # The base of the other study is measured at its own original length.
    assert "| other | yarn | trained: all parameters |  | 1.045 | 0.955 |  | 0.873 | 0.864 |" in report
    assert "| other | linear" not in report


def test_a_study_without_retrieval_or_training(tmp_path: Path) -> None:
    untrained = {("none", "none"): (22.0, 20.0, 30.0, 40.0)}
    others = {key: () for key in study_keys() if key not in untrained}
    results = study_results(untrained | others, retrievals=[], trainings=[])
    for name in ("beside.png", "retrieval.png"):
        (tmp_path / name).write_text("of an earlier report")
    write_study_report(tmp_path, results)
    report = (tmp_path / "report.md").read_text()
    assert "Nothing was trained." in report
    assert "Retrieval" not in report
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) - {"beside.png", "retrieval.png"}


def study_keys() -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.rope, row.trained) for row in study_results().perplexities))


@pytest.mark.parametrize("content", [None, "[", json.dumps({"name": "x"}), json.dumps([])])
def test_rejects_what_is_no_study(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(
        ValueError, match="give the directory of a finished study" if content is None else "is not of a study"
    ):
        read_results(tmp_path)
