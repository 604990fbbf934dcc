"""Verdicts on the papers' findings, from made-up numbers."""

import pytest
from studies import study_results

from phi3_jax.rope_lab.study.findings import Finding, findings

TITLES = ("linear", "ntk", "yarn", "searched", "short")


def verdicts(**changes: tuple[float, ...]) -> dict[str, Finding]:
    """Returns the findings; a change such as `yarn_full` replaces the perplexities of a rope."""
    table = {tuple(name.split("_")): values for name, values in changes.items()}
    return dict(zip(TITLES, findings(study_results(table)), strict=True))  # type: ignore[arg-type]


def test_confirms_what_the_numbers_show() -> None:
    found = verdicts()
    assert {each.verdict for each in found.values()} == {"confirmed"}
    assert found["linear"].numbers == "lowest 80.00, at 512; base 20.00: 4.00 times"
    assert found["ntk"].numbers == "ntk 28.00, plain 1,000.00; base 20.00: 1.40 times"
    assert found["yarn"].numbers == "yarn 19.000, best of the others ntk 19.300"
    assert (
        found["searched"].numbers
        == "untrained: searched 23.000, yarn 25.000; full: searched 18.800, yarn 19.000"
    )
    assert found["short"].numbers == (
        "worst searched at 512: 1.010 times plain rope; of those with one list the worst there is linear: "
        "1.080 times"
    )
    assert "at least 1.5 times that of the base within 512 tokens" in found["linear"].rule


@pytest.mark.parametrize(
    ("finding", "changes"),
    [
        ("linear", {"linear_none": (90.0, 29.9, 100.0, 120.0)}),
        ("ntk", {"ntk_none": (22.0, 20.0, 24.0, 30.0)}),
        ("ntk", {"none_none": (22.0, 20.0, 22.0, 27.0)}),
        ("yarn", {"ntk_full": (21.9, 20.1, 19.4, 18.9)}),
        ("searched", {"searched_full": (22.0, 20.1, 19.0, 18.95)}),
        ("searched", {"searched_none": (22.0, 20.0, 21.0, 24.9)}),
        ("short", {"searched_full": (22.0, 20.4, 19.0, 18.8)}),
    ],
)
def test_contradicts_at_the_threshold(finding: str, changes: dict[str, tuple[float, ...]]) -> None:
    found = verdicts(**changes)
    assert [name for name in TITLES if found[name].verdict == "contradicted"] == [finding]


def test_does_not_decide_without_the_numbers() -> None:
    assert verdicts(linear_none=())["linear"].numbers == "needs an untrained linear rope"
    assert verdicts(searched_none=(), searched_full=())["searched"].verdict == "not measured"
    assert verdicts(searched_none=())["searched"].verdict == "confirmed"
    untrained = verdicts(**{f"{name}_full": () for name in ("none", "linear", "ntk", "yarn", "searched")})
    assert [untrained[name].verdict for name in ("yarn", "short")] == ["not measured"] * 2
    found = verdicts(none_none=())
    assert found["linear"].verdict == found["ntk"].verdict == "not measured"
    assert found["short"].verdict == "confirmed"
