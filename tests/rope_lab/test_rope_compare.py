"""Comparisons of ropes: measurements, files, resuming, and errors before any work."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from small_checkpoint import write_checkpoint
from stores import open_store

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.perplexity import perplexity
from phi3_jax.evaluation.scorer import Scorer, Scores, frequencies_for
from phi3_jax.rope_lab.comparison import compare as rope_compare
from phi3_jax.rope_lab.comparison.compare import Comparison, compare_ropes
from phi3_jax.rope_lab.comparison.facts import answers_found
from phi3_jax.rope_lab.comparison.report import fact_table, table, write_comparison
from phi3_jax.rope_lab.objectives.needles import NeedleTexts
from phi3_jax.rope_lab.objectives.objectives import Sample
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.urls import list_entries

PNG = b"\x89PNG\r\n\x1a\n"
ROPES = ["none", "linear:factor=4", "dynamic:factor=4", "yarn:factor=4", "longrope:@factors.json"]
LENGTHS = [16, 24, 48]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 16, "original_max_position_embeddings": 16}
    write_checkpoint(folder, **sizes)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    factors = {"factors": [1.0, 1.1, 1.4, 2.0, 3.1, 4.5], "factor": 4, "initial_tokens": 3}
    Path("factors.json").write_text(json.dumps(factors))
    draws = np.random.default_rng(0)
    Path("text.txt").write_text("".join(draws.choice(list("abcdefgh ijkl"), 400)))


def compare(model: Path, ropes: list[str] = ROPES, **changes: Any) -> Comparison:
    arguments: dict[str, Any] = {"lengths": LENGTHS, "dtype": "float32", "show": False}
    text = changes.pop("text", Path("text.txt"))
    return compare_ropes(
        model, text, changes.pop("output", "out"), [parse_rope(each) for each in ropes], **arguments | changes
    )


def test_cells_match_the_perplexity_of_the_same_tokens(model: Path) -> None:
    comparison = compare(model)
    ours = Phi3ForCausalLM.from_pretrained(model, dtype="float32")
    ids = np.array(Phi3Tokenizer.from_pretrained(model).encode(Path("text.txt").read_text())[:48])
    assert comparison.tokens == 48
    for name in ROPES:
        argument = parse_rope(name)
        for length in LENGTHS:
            expected = perplexity(
                Scorer(ours),
                ids,
                argument.apply(ours.config),
                length=length,
                initial_tokens=argument.initial_tokens,
            )
            cell = comparison.cell(name, length)
            assert cell.loss.tokens == expected.tokens == 47
            assert cell.loss.loss == pytest.approx(expected.loss, rel=1e-5)
            assert cell.stride == (length if length == 48 else length // 2)
    values = [comparison.cell(name, 48).loss.loss for name in ROPES]
    assert len({round(value, 3) for value in values}) == len(ROPES)


def test_asks_for_facts_that_are_hidden_in_the_text(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with scores of the whole texts, and adds texts to those of an earlier call."""
    Path("long.txt").write_text("abc defgh ijkl. " * 200)
    options: dict[str, Any] = {"text": Path("long.txt"), "lengths": [380, 400], "facts": 2}
    compare(model, ROPES[:2], **options)
    comparison = compare(model, ROPES[:2], **options, fact_texts=2)
    ours = Phi3ForCausalLM.from_pretrained(model, dtype="float32")
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    ids = np.array(tokenizer.encode("abc defgh ijkl. " * 200, add_special_tokens=False))
    for name in ROPES[:2]:
        for length in (380, 400):
            inv_freq, scaling = frequencies_for(parse_rope(name).apply(ours.config), length)
            loss, found = 0.0, 0
            for number in range(2):
                text = ids[number * length :][:length]
                sample = NeedleTexts(tokenizer, 2)(text, length, number)
                scores = Scorer(ours).score(sample.tokens, inv_freq, scaling)
                scored = np.flatnonzero(sample.scored) - 1
                loss += scores.losses[0, scored].sum()
                answers = np.split(scored, np.flatnonzero(np.diff(scored) > 1) + 1)
                assert len(answers) == 2
                found += sum(scores.greedy[0, answer].all() for answer in answers)
            cell = comparison.fact_cell(name, length)
            assert cell.loss.loss == pytest.approx(loss, rel=1e-5)
            assert (cell.found, cell.asked) == (found, 4)
    write_comparison(Path("out"), comparison)
    report = Path("out/report.md").read_text()
    assert "2 facts are hidden in each of 2 texts of each length" in report
    assert len(json.loads(Path("out/results.json").read_text())["facts"]) == 4
    assert "0% (" in str(fact_table(comparison).columns[1]._cells)
    monkeypatch.setattr(rope_compare.Pipeline, "load", None)
    assert compare(model, ROPES[:2], **options, fact_texts=2).facts == comparison.facts
    with pytest.raises(ValueError, match="9 texts of 400 tokens with hidden facts need 3,600"):
        compare(model, ROPES[:2], **options, fact_texts=9)
    with pytest.raises(ValueError, match="380 tokens are too few for 99 needles"):
        compare(model, ROPES[:2], **options | {"facts": 99})


@pytest.mark.parametrize("greedy", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0]])
def test_an_answer_is_found_if_all_its_tokens_are(greedy: list[int]) -> None:
    scored = np.array([0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1], bool)
    sample = Sample(np.zeros(11, np.int32), scored)
    likely = np.ones((1, 9), bool)
    likely[0, scored[2:]] = greedy
    scores = Scores(np.arange(9, dtype=np.float32)[None], likely)
    expected = [all(part) for part in (greedy[:2], greedy[2:3], greedy[3:])].count(True)
    assert answers_found(sample, scores) == (0 + 1 + 3 + 6 + 7 + 8, expected)


@pytest.mark.parametrize("kind", ["memory", slow("gs"), slow("s3")])
def test_writes_to_a_store(model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes measures nothing again."""
    local = compare(model, ROPES[:2])
    with open_store(kind) as bucket:
        store = bucket.empty_folder()
        url = f"{store.url}/out"
        compare(model, ROPES[:1], output=url)
        both = compare(model, ROPES[:2], output=url)
        assert [cell[:4] for cell in both.cells] == [cell[:4] for cell in local.cells]
        monkeypatch.setattr(rope_compare.Pipeline, "load", None)
        assert compare(model, ROPES[:2], output=url).seconds["forward"] == 0
        with pytest.raises(ValueError, match=r"out was started with other options .* dtype: 'float32' -> "):
            compare(model, output=url, dtype="bfloat16")
        write_comparison(url, both)
        write_comparison(Path("out"), both)
        names = sorted(path.name for path in Path("out").iterdir())
        assert [entry.name for entry in list_entries(url)] == names
        for name in names:
            if name != "state.json":  # it has the times
                assert store.get(f"out/{name}") == Path("out", name).read_bytes(), name


def test_limits_the_stride_to_the_length(model: Path) -> None:
    comparison = compare(model, ["none"], lengths=[16, 48], stride=48)
    assert [cell.stride for cell in comparison.cells] == [16, 48]
    assert [cell.loss.tokens for cell in comparison.cells] == [48 - 3, 47]
    write_comparison(Path("out"), comparison)
    text = "first 48 except the first one, and except the first of each window where windows do not overlap."
    assert text in Path("out/report.md").read_text()


def test_skips_tokens(model: Path) -> None:
    comparison = compare(model, ["none"], lengths=[16], skip_tokens=100, max_tokens=64, stride=5)
    ours = Phi3ForCausalLM.from_pretrained(model, dtype="float32")
    ids = np.array(Phi3Tokenizer.from_pretrained(model).encode(Path("text.txt").read_text())[100:164])
    expected = perplexity(Scorer(ours), ids, length=16, stride=5)
    assert comparison.cell("none", 16).loss.loss == pytest.approx(expected.loss, rel=1e-5)


def test_writes_tables_figures_and_report(model: Path) -> None:
    comparison = compare(model)
    write_comparison(Path("out"), comparison)
    with open("out/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rope"], int(row["length"])) for row in rows] == [(r, n) for r in ROPES for n in LENGTHS]
    for row in rows:
        loss = comparison.cell(row["rope"], int(row["length"])).loss
        assert float(row["perplexity"]) == pytest.approx(loss.perplexity)
        assert float(row["loss"]) == pytest.approx(loss.loss / 47)
    content = json.loads(Path("out/results.json").read_text())
    assert content["results"][0]["perplexity"] == pytest.approx(comparison.cells[0].loss.perplexity)
    assert set(content["seconds"]) == {"forward", "compile", "all"}
    assert 0 < content["seconds"]["forward"] < content["seconds"]["all"]
    linear = content["ropes"]["linear:factor=4"]
    np.testing.assert_allclose(linear["factors"], 4, rtol=1e-6)
    np.testing.assert_allclose(linear["wavelengths"][0], 8 * np.pi, rtol=1e-6)
    np.testing.assert_allclose(
        content["ropes"]["longrope:@factors.json"]["factors"], [1.0, 1.1, 1.4, 2.0, 3.1, 4.5], rtol=1e-6
    )
    for name in ("perplexity.png", "wavelengths.png"):
        assert Path("out", name).read_bytes().startswith(PNG)
    report = Path("out/report.md").read_text()
    assert "| rope | 16 | 24 | 48 |" in report
    assert "the same 47 tokens" in report
    assert "8 apart at 16, 12 apart at 24, one window at 48" in report
    shown = table(comparison)
    assert shown.row_count == len(ROPES)


def count_windows(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[Any]:
    measured: list[Any] = []
    score = Scorer.score

    def watched(self: Scorer, *arguments: Any, **options: Any) -> Any:
        if len(measured) == stop_after:
            raise KeyboardInterrupt
        measured.append(arguments)
        return score(self, *arguments, **options)

    monkeypatch.setattr(Scorer, "score", watched)
    return measured


def test_resumes_after_a_kill(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(model, ROPES[:2])
    Path("out/state.json").unlink()
    with monkeypatch.context() as patch:
        count_windows(patch, stop_after=7)
        with pytest.raises(KeyboardInterrupt):
            compare(model, ROPES[:2])
    measured = count_windows(monkeypatch)
    again = compare(model, ROPES[:2])
    assert len(measured) == 2 * (5 + 3 + 1) - 7
    assert [cell.loss for cell in again.cells] == [cell.loss for cell in whole.cells]


def test_measures_only_new_ropes_and_lengths(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(model, ROPES[:2], max_tokens=48, lengths=[16, 48])
    measured = count_windows(monkeypatch)
    comparison = compare(model, [ROPES[0], ROPES[2]], max_tokens=48)
    # Up to the 16 tokens that the model was trained on, dynamic NTK is plain rope, which is measured.
    assert len(measured) == 3 + (0 + 3 + 1)
    assert len(comparison.cells) == 6
    assert comparison.cell(ROPES[0], 16).loss == comparison.cell(ROPES[2], 16).loss
    measured.clear()
    monkeypatch.setattr(rope_compare.Pipeline, "load", None)  # no model is needed
    compare(model, [ROPES[2]], max_tokens=48)
    assert not measured


def test_measures_a_changed_list_of_the_same_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compare(model, [ROPES[4]], lengths=[48])
    Path("factors.json").write_text(json.dumps({"factors": [1.0, 2, 2, 2, 2, 2], "factor": 4}))
    after = compare(model, [ROPES[4]], lengths=[48])
    assert abs(before.cells[0].loss.loss / after.cells[0].loss.loss - 1) > 1e-4


def test_rejects_another_text(model: Path, tmp_path: Path) -> None:
    compare(model, ["none"], lengths=[16])
    Path("text.txt").write_text("mlkji " * 60)
    with pytest.raises(ValueError, match=r"was started with other options.*text_digest"):
        compare(model, ["none"], lengths=[16])
    compare(model, ["none"], lengths=[16], overwrite=True)


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "short": (
        {"lengths": [16, 4096]},
        r"text.txt has \d+ tokens, fewer than the length 4,096; give a longer",
    ),
    "skipped": ({"skip_tokens": 370, "lengths": [48]}, r"has \d+ tokens after the 370 that are skipped"),
    "cut": ({"max_tokens": 20}, "max_tokens=20 is less than the longest length, 48"),
    "stride": ({"stride": -1}, "stride=-1 must be from 1 to the length, 16"),
    "list": ({"ropes": ["longrope:@short.json"]}, r"\['long_factor'\] has 2 entries; give 6"),
    "twice": ({"ropes": ["none", "none"]}, "--rope none is given twice"),
    "absent": ({"text": Path("nowhere.txt")}, "there is no file nowhere.txt"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects_wrong_options_before_any_work(
    model: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REJECTED[case]
    Path("short.json").write_text(json.dumps({"factors": [1.0, 2.0], "factor": 4}))
    monkeypatch.setattr(rope_compare.Pipeline, "load", None)
    monkeypatch.setattr(Journal, "add", None)
    with pytest.raises((ValueError, OSError), match=message):
        compare(model, **{"ropes": ["none"]} | changes)


def test_rejects_a_length_that_does_not_fit_in_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import phi3_jax.generation.memory as memory

    monkeypatch.setattr(memory, "_free", lambda device: 20_000)
    monkeypatch.setattr(rope_compare.Pipeline, "load", None)
    with pytest.raises(ValueError, match=r"48 tokens need .* GiB for keys and values, and memory has"):
        compare(model, ["none"])
    assert not Path("out").exists()
