"""`phi3-jax rope critical` on a small random model: files, measurements and resuming."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from compilations import compilations
from reference import distance
from small_checkpoint import Checkpoint, write_checkpoint
from stores import open_store
from their_perplexity import Rope, patch

from phi3_jax import Phi3Config, Phi3Tokenizer
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.rope_lab.critical import run as critical_run
from phi3_jax.rope_lab.critical.report import write_critical_report
from phi3_jax.rope_lab.critical.run import CriticalPair, find_critical_pair
from phi3_jax.rope_lab.objectives.options import ObjectiveOptions

LENGTH, TRAINED = 384, 128
NEEDLE = ObjectiveOptions("needle", (LENGTH,), needles=1, samples=2, seed=4)
FILES = {
    "critical.csv",
    "critical.json",
    "critical.png",
    "report.md",
    "factors.json",
    "state.json",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config says that it was trained on 128 tokens; it has 6 pairs."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": TRAINED, "original_max_position_embeddings": TRAINED}
    write_checkpoint(folder, initializer_range=0.2, pad_token_id=0, **sizes)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draws = random.Random(3)
    words = ["What", "is", "the", "capital", "of", "x."]
    path.write_text(" ".join(draws.choice(words) for _ in range(900)))
    return path


def find(model: Path, text: Path, output: Any, **changes: Any) -> CriticalPair:
    options = {"objective": NEEDLE, "dtype": "float32", "batch_size": 3, "show": False}
    return find_critical_pair(model, text, output, **options | changes)


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    write_critical_report(output, find(model, text, output, pairs="all", yarn_attention=True))
    return output


def test_writes_tables_figure_report_and_factors(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == FILES
    content = json.loads((whole / "critical.json").read_text())
    assert content["theoretical_pair"] == 2 == content["theoretical_dimension"] // 2
    assert content["turns"][1] > 1 > content["turns"][2]
    assert content["asked"]["trained_length"] == TRAINED
    assert [each["pair"] for each in content["single_pairs"]] == list(range(6))
    assert list(content["known"]) == ["none", "linear", "ntk", "yarn"]
    best = min(content["candidates"], key=lambda each: each["perplexity"])
    assert content["critical_pair"] == best["pair"]
    with (whole / "critical.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = [row["kind"] for row in rows]
    assert (
        kinds
        == ["candidate"] * len(content["candidates"])
        + [*content["known"]]
        + [
            "pair plain",
            "pair stretched",
        ]
        * 6
    )
    assert [float(row["perplexity"]) for row in rows[: len(content["candidates"])]] == [
        each["perplexity"] for each in content["candidates"]
    ]
    factors = json.loads((whole / "factors.json").read_text())
    assert factors["long_factor"] == best["factors"]
    assert factors["attention_factor"] == best["attention_factor"]
    assert factors["about"]["perplexity"] == best["perplexity"]
    report = (whole / "report.md").read_text()
    assert f"The best candidate is {best['pair']} (dim {2 * best['pair']})" in report
    assert "to 1 questions" not in report
    assert (whole / "critical.png").stat().st_size > 10_000


@stored
def loss_of_theirs(theirs: Checkpoint, tokens: np.ndarray, labels: np.ndarray, rope: Rope) -> float:
    """Returns the mean loss of transformers over the labels that are not -100."""
    import torch

    inv_freq, scaling = frequencies_for(rope.config, LENGTH)
    patch(theirs.model, torch.tensor(inv_freq), scaling)
    with torch.no_grad():
        ids, targets = (torch.tensor(each)[None].long() for each in (tokens, labels))
        return float(theirs.model(ids, labels=targets).loss)


def test_perplexities_match_transformers(model: Path, text: Path, whole: Path) -> None:
    """Compares the rope of factors.json, and YaRN's, by the usual options of --rope."""
    config = Phi3Config.from_pretrained(model)
    objective, _ = NEEDLE.make(Phi3Tokenizer.from_pretrained(model), text.read_text(), "")
    known = json.loads((whole / "critical.json").read_text())["known"]
    best = json.loads((whole / "factors.json").read_text())["about"]["perplexity"]
    theirs = Checkpoint(model)
    for rope, perplexity in (
        (f"longrope:@{whole / 'factors.json'}", best),
        ("yarn:factor=3", known["yarn"]["perplexity"]),
    ):
        applied = Rope(parse_rope(rope).apply(config))
        losses = [
            loss_of_theirs(theirs, each.tokens, np.where(each.scored, each.tokens, -100), applied)
            for each in objective.samples[LENGTH]
        ]
        counts = [each.scored.sum() for each in objective.samples[LENGTH]]
        assert distance(perplexity, np.exp(np.average(losses, weights=counts))) < 1e-5


def test_resumes_to_the_same_result(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies after two batches, resumes without those; further options add to the output."""
    output, batches = tmp_path / "out", []
    measure = critical_run.measure

    def counted(*arguments: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(arguments[2]))
        return measure(*arguments)

    monkeypatch.setattr(critical_run, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        find(model, text, output, yarn_attention=True)
    monkeypatch.setattr(critical_run, "measure", measure)
    resumed = find(model, text, output, yarn_attention=True)
    assert resumed.new + sum(batches) == len(json.loads((output / "state.json").read_text())["entries"])
    added = find(model, text, output, yarn_attention=True, pairs="all")
    assert (added.candidates, added.known) == (resumed.candidates, resumed.known)
    assert (output / "state.json").read_bytes() == (whole / "state.json").read_bytes()


def test_a_finished_experiment_needs_no_model(
    model: Path, text: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critical_run.Pipeline, "load", None)
    done = find(model, text, whole, pairs=[2], yarn_attention=True)
    assert (done.new, len(done.effects)) == (0, 1)


def test_all_ropes_share_one_program(model: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """The fixture `whole` has compiled it."""
    with compilations() as programs:
        find(model, text, tmp_path / "out", candidates=[1, 4], pairs=[0])
    assert programs == []


def test_measures_perplexity_into_a_store(model: Path, text: Path) -> None:
    objective = ObjectiveOptions("perplexity", (200,), needles=0)
    with open_store("memory") as bucket:
        store = bucket.empty_folder()
        result = find(model, text, f"{store.url}/out", objective=objective, candidates=[2, 5], trained=100)
        write_critical_report(f"{store.url}/out", result)
        assert b"the perplexity of 1 part of" in store.get("out/report.md")
        for name in FILES:
            assert store.get(f"out/{name}")
    assert (result.base.extension, result.crossing) == (2, None)


def test_rejects_wrong_options_before_any_work(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critical_run.Pipeline, "load", None)
    output = tmp_path / "out"
    for changes, message in (
        ({"trained": LENGTH}, "length=384 must be more than the 384 tokens that the model was trained on"),
        ({"candidates": [6]}, "candidates: 6 must be from 0 to 5, the model's last pair of dims"),
        ({"pairs": [1, 9]}, "pairs: 9 must be from 0 to 5"),
        ({"objective": replace(NEEDLE, needles=5)}, "384 tokens are too few for 5 needles"),
        ({"objective": replace(NEEDLE, samples=99)}, "99 windows of 384 need 38,016"),
    ):
        with pytest.raises(UserError, match=message):
            find(model, text, output, **changes)
    monkeypatch.setattr("phi3_jax.evaluation.scorer.token_capacity", lambda _: 600)
    with pytest.raises(UserError, match="3 rows of 384 tokens need"):
        find(model, text, output)
    assert not output.exists()


def test_rejects_other_options(model: Path, text: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"seed: 4 -> 5.*--overwrite"):
        find(model, text, whole, objective=replace(NEEDLE, seed=5))
    with pytest.raises(UserError, match=r"trained_length: 128 -> 64"):
        find(model, text, whole, trained=64)
