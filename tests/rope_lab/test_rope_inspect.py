"""Inspections of ropes: measurements, files, resuming, and errors before any work."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.scorer import Scorer, frequencies_for
from phi3_jax.rope_lab.inspection import run as inspect_run
from phi3_jax.rope_lab.inspection.angles import text_angles, trained_turns
from phi3_jax.rope_lab.inspection.attention_profiles import attention_profile, sample_positions
from phi3_jax.rope_lab.inspection.report import FILES, write_inspection
from phi3_jax.rope_lab.inspection.run import Inspection, inspect_ropes
from phi3_jax.storage.journal import Journal

PNG = b"\x89PNG\r\n\x1a\n"
ROPES = ["none", "dynamic:factor=4", "yarn:factor=4", "longrope:@first.json"]
LENGTHS = [16, 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, max_position_embeddings=16, original_max_position_embeddings=16)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.json").write_text('{"factors": [1, 1.1, 1.4, 2, 3.1, 4.5], "factor": 4, "initial_tokens": 3}')
    draws = np.random.default_rng(0)
    Path("text.txt").write_text("".join(draws.choice(list("abcdefgh ijkl"), 400)))


def inspect(model: Path, ropes: list[str] = ROPES, **changes: Any) -> Inspection:
    arguments: dict[str, Any] = {"lengths": LENGTHS, "queries": 5, "dtype": "float32", "show": False}
    text = changes.pop("text", Path("text.txt"))
    output = changes.pop("output", "out")
    return inspect_ropes(model, text, output, [parse_rope(each) for each in ropes], **arguments | changes)


def count_profiles(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    measured: list[int] = []

    def watched(scorer: Scorer, tokens: np.ndarray, *arguments: Any, **options: Any) -> Any:
        if len(measured) == stop_after:
            raise KeyboardInterrupt
        measured.append(len(tokens))
        return attention_profile(scorer, tokens, *arguments, **options)

    monkeypatch.setattr(inspect_run, "attention_profile", watched)
    return measured


def test_measures_and_writes_each_rope_at_each_length(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = count_profiles(monkeypatch)
    inspection = inspect(model, skip_tokens=3, sink_tokens=2)
    # Up to the 16 tokens that the model was trained on, dynamic NTK is plain rope.
    assert measured == [16, 16, 16, 40, 40, 40, 40]
    write_inspection("out", inspection)
    assert {path.name for path in Path("out").iterdir()} - {".state.json.lock"} == set(FILES)
    attention, angles = np.load("out/attention.npz"), np.load("out/angles.npz")
    ours = Phi3ForCausalLM.from_pretrained(model, dtype="float32")
    ids = np.array(Phi3Tokenizer.from_pretrained(model).encode(Path("text.txt").read_text())[3:])
    for row, name in enumerate(ROPES):
        argument = parse_rope(name)
        config = argument.apply(ours.config)
        for column, length in enumerate(LENGTHS):
            inv_freq, scaling = frequencies_for(config, length)
            expected = attention_profile(
                Scorer(ours),
                ids[:length],
                inv_freq,
                scaling,
                initial_tokens=argument.initial_tokens,
                positions=sample_positions(length, 5),
                sink_tokens=2,
            ).mean()
            for field in ("entropy", "sink", "distance"):
                np.testing.assert_allclose(
                    attention[field][row, column], getattr(expected, field), rtol=1e-5, atol=1e-7
                )
            bins = expected.mass.shape[-1]
            np.testing.assert_allclose(attention["mass"][row, column, ..., :bins], expected.mass, atol=1e-6)
            assert (attention["mass"][row, column, ..., bins:] == 0).all()
            unseen = text_angles(ours.config, inv_freq, length)
            np.testing.assert_array_equal(angles["unseen"][row, column], unseen.unseen)
            np.testing.assert_array_equal(angles["turns"][row, column], unseen.turns)
            np.testing.assert_array_equal(angles["inv_freq"][row, column], inv_freq)
    assert len({round(float(each.mean()), 5) for each in attention["entropy"][:, 1]}) == len(ROPES)
    for arrays in (attention, angles):
        assert (arrays["ropes"].tolist(), arrays["lengths"].tolist()) == (ROPES, LENGTHS)
    assert attention["bins"].tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    assert (int(angles["trained_length"]), int(angles["critical_pair"])) == (16, 1)
    np.testing.assert_array_equal(angles["trained_turns"], trained_turns(ours.config))
    check_tables(inspection, attention, angles)


def check_tables(inspection: Inspection, attention: Any, angles: Any) -> None:
    with open("out/attention.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ROPES) * len(LENGTHS) * 2 * 4
    row = rows[-3]
    assert (row["rope"], row["length"], row["layer"], row["head"]) == (ROPES[-1], "40", "1", "1")
    assert float(row["entropy"]) == attention["entropy"][-1, -1, 1, 1]
    assert float(row["distance"]) == attention["distance"][-1, -1, 1, 1]
    with open("out/angles.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    assert len(pairs) == len(ROPES) * len(LENGTHS) * 6
    assert float(pairs[-1]["unseen"]) == angles["unseen"][-1, -1, 5]
    assert float(pairs[-1]["wavelength"]) == pytest.approx(2 * np.pi / angles["inv_freq"][-1, -1, 5])
    for name in ("entropy.png", "profile.png", "angles.png"):
        assert Path("out", name).read_bytes().startswith(PNG)
    report = Path("out/report.md").read_text()
    assert "after its first 3 tokens. Each length has 5 queries" in report
    assert "In a training text, 1 of 6 pairs of dims turn at least once" in report
    assert f"| none | 40 | {attention['entropy'][0, 1].mean():.3f} |" in report


def test_resumes_after_a_kill(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later call with other ropes and lengths measures only these."""
    whole = inspect(model, ROPES[:2], output="whole")
    with monkeypatch.context() as patch:
        count_profiles(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            inspect(model, ROPES[:2])
    measured = count_profiles(monkeypatch)
    again = inspect(model, ROPES[:2])
    assert (measured, again.new, whole.new) == ([40], 1, 3)
    assert again.profiles.keys() == whole.profiles.keys()
    for cell, profile in whole.profiles.items():
        for one, other in zip(profile, again.profiles[cell], strict=True):
            np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(inspect_run.Pipeline, "load", None)  # no model is needed
    assert inspect(model, [ROPES[1]], lengths=[40]).new == 0
    with pytest.raises(ValueError, match=r"was started with other options .*queries: 5 -> 4"):
        inspect(model, queries=4)


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "short": ({"lengths": [4096]}, r"text.txt has \d+ tokens, fewer than the length 4,096; give a longer"),
    "skipped": ({"skip_tokens": 370}, r"has \d+ tokens after the 370 that are skipped"),
    "queries": ({"queries": 9}, "queries=9 must be from 1 to 8, half of the 16 tokens"),
    "twice": ({"ropes": ["none", "none"]}, "--rope none is given twice"),
    "absent": ({"text": Path("nowhere.txt")}, "there is no file nowhere.txt"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects_wrong_options_before_any_work(
    model: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REJECTED[case]
    monkeypatch.setattr(inspect_run.Pipeline, "load", None)
    monkeypatch.setattr(Journal, "add", None)
    with pytest.raises((ValueError, OSError), match=message):
        inspect(model, **{"ropes": ["none"]} | changes)
    assert not Path("out").exists()


def test_rejects_a_length_that_does_not_fit_in_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import phi3_jax.generation.memory as memory

    monkeypatch.setattr(memory, "_free", lambda device: 20_000)
    monkeypatch.setattr(inspect_run.Pipeline, "load", None)
    with pytest.raises(ValueError, match=r"tokens need .* GiB for keys and values, and memory has"):
        inspect(model, ["none"])
    assert not Path("out").exists()
