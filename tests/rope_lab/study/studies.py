"""Made-up results of a study, whose numbers confirm every finding."""

from typing import Any

from phi3_jax.rope_lab.study.results import PerplexityRow, RetrievalRow, StudyResults, StudyRope, TrainingRow

LENGTHS = (256, 512, 2048, 4096)
PERPLEXITIES = {
    ("none", "none"): (22.0, 20.0, 300.0, 1000.0),
    ("linear", "none"): (90.0, 80.0, 100.0, 120.0),
    ("ntk", "none"): (22.0, 20.0, 24.0, 28.0),
    ("yarn", "none"): (24.0, 22.0, 22.0, 25.0),
    ("searched", "none"): (22.0, 20.0, 21.0, 23.0),
    ("none", "full"): (21.8, 19.9, 19.5, 19.4),
    ("linear", "full"): (24.0, 21.5, 20.0, 19.8),
    ("ntk", "full"): (21.9, 20.1, 19.4, 19.3),
    ("yarn", "full"): (23.0, 21.0, 19.2, 19.0),
    ("searched", "full"): (22.0, 20.1, 19.0, 18.8),
}


def study_results(
    changes: dict[tuple[str, str], tuple[float, ...]] | None = None, **fields: Any
) -> StudyResults:
    """Returns the results with other perplexities of some ropes; an empty tuple leaves a rope out."""
    table = PERPLEXITIES | (changes or {})
    kinds = {"none": "plain"}
    return StudyResults(
        **{
            "name": "made-up",
            "model": "trained from scratch",
            "original": 512,
            "length": 4096,
            "ropes": [
                StudyRope(
                    name, f"{name}:factor=8", kinds.get(name, name), name == "searched", [1.0, 2.0, 8.0], 1.2
                )
                for name in ("none", "linear", "ntk", "yarn", "searched")
            ],
            "perplexities": [
                PerplexityRow(rope, trained, length, value, 4095)
                for (rope, trained), values in table.items()
                for length, value in zip(LENGTHS, values, strict=bool(values))
            ],
            "retrievals": [
                RetrievalRow(rope, "full", "passkey", length, right, 20)
                for rope, right in (("none", 3), ("yarn", 18))
                for length in (512, 4096)
            ],
            "trainings": [
                TrainingRow("", "full", 2000, 1800.0, 3.1, 3.2),
                TrainingRow("yarn", "full", 60, 300.0, 3.0, 3.1),
            ],
        }
        | fields
    )
