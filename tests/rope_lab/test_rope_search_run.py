"""`phi3-jax rope search` on a small random model: measurements, files and resuming."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from compilations import compilations
from marks import slow
from reference import distance, run, run_theirs
from small_checkpoint import Checkpoint, write_checkpoint
from stores import open_store
from their_perplexity import Rope

from phi3_jax import Phi3Config, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.rope_lab.objectives.objectives import ScoredRope, measure
from phi3_jax.rope_lab.objectives.options import ObjectiveOptions
from phi3_jax.rope_lab.search import run as search_run
from phi3_jax.rope_lab.search.cobyqa import Cobyqa
from phi3_jax.rope_lab.search.evolution import Evolution
from phi3_jax.rope_lab.search.run import search_ropes
from phi3_jax.rope_lab.search.search import Stages

LENGTH = 96
EVOLUTION = Evolution(population=8, iterations=2, parents=3, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config says that it was trained on 32 tokens."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 32, "original_max_position_embeddings": 32}
    write_checkpoint(folder, initializer_range=0.2, pad_token_id=0, **sizes)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draws = random.Random(3)
    path.write_text(" ".join(draws.choice(["What", "is", "the", "capital", "of", "x"]) for _ in range(600)))
    return path


def search(model: Path, text: Path, output: Path, *, length: int = LENGTH, **changes: Any) -> Any:
    options = {"method": EVOLUTION, "batch_size": 3, "dtype": "float32", "show": False}
    options["objective"] = ObjectiveOptions("perplexity", (length,), samples=2, needles=0)
    return search_ropes(model, text, output, **options | changes)


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    search(model, text, output, initial_tokens=(0, 4))
    return output


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def windows(model: Path, text: Path) -> list[list[int]]:
    ids = Phi3Tokenizer.from_pretrained(model).encode(text.read_text())
    return [ids[:LENGTH], ids[len(ids) // 2 :][:LENGTH]]


def test_writes_factors_history_figure_and_model(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "factors.json",
        "history.csv",
        "model",
        "search.png",
        "state.json",
    }
    factors = json.loads((whole / "factors.json").read_text())
    assert factors["rope_type"] == "longrope"
    assert factors["short_factor"] == [1.0] * 6
    assert (factors["original_max_position_embeddings"], factors["max_position_embeddings"]) == (32, LENGTH)
    assert list(factors["about"]["known"]) == ["none", "linear", "ntk", "yarn"]
    assert factors["about"]["perplexity"] <= min(factors["about"]["known"].values())
    with (whole / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == factors["about"]["measured"] == 8 + 2 * 5
    assert [row["known_as"] for row in rows[:5]] == ["none", "linear", "ntk", "yarn", ""]
    assert [int(row["iteration"]) for row in rows] == [0] * 4 + [1] * 4 + [2] * 5 + [3] * 5
    assert {row["initial_tokens"] for row in rows} == {"0", "4"}
    assert {row["stage"] for row in rows} == {"1"}
    best = min(rows, key=lambda row: float(row["perplexity"]))
    assert float(best["perplexity"]) == factors["about"]["perplexity"] == float(rows[-1]["best"])
    assert [float(best[f"factor_{pair}"]) for pair in range(6)] == factors["long_factor"]
    assert (whole / "search.png").stat().st_size > 10_000


@stored
def perplexity_of_theirs(theirs: Checkpoint, parts: list[list[int]], rope: Rope | None) -> float:
    """Returns the perplexity of windows, with the model's own rope or the frequencies of another."""
    import torch

    rotary = theirs.model.model.rotary_emb
    if rope is not None:
        scaling, base = rope.config.rope_scaling, rope.config.rope_base
        inv_freq, rotary.attention_scaling = scaling.frequencies(base, np.array([LENGTH]))
        rotary.inv_freq = torch.tensor(np.array(inv_freq))
    losses = []
    for part in parts:
        ids = torch.tensor([part])
        with torch.no_grad():
            losses.append(float(theirs.model(ids, labels=ids, use_cache=False).loss))
    return float(np.exp(np.mean(losses)))


def test_perplexities_match_transformers(model: Path, text: Path, whole: Path) -> None:
    """Compares each method's frequencies, and the model directory as transformers loads it."""
    about = json.loads((whole / "factors.json").read_text())["about"]
    config = Phi3Config.from_pretrained(model)
    lists = Phi3Config.from_pretrained(whole / "model").rope_scaling
    state = json.loads((whole / "state.json").read_text())["entries"]
    unscaled = [entry for entry in state if entry["initial_tokens"] == 0]
    best = min(unscaled, key=lambda entry: entry["losses"][str(LENGTH)][0])
    assert dict(lists.parameters)["long_factor"] == tuple(best["factors"])

    parts = windows(model, text)
    expected = perplexity_of_theirs(Checkpoint(whole / "model"), parts, None)
    loss, tokens = best["losses"][str(LENGTH)]
    assert expected == pytest.approx(np.exp(loss / tokens), rel=1e-5)
    for name in ("none", "linear:factor=3", "yarn:factor=3"):
        rope = Rope(parse_rope(name).apply(config))
        expected = perplexity_of_theirs(Checkpoint(model), parts, rope)
        assert expected == pytest.approx(about["known"][name.partition(":")[0]], rel=1e-5), name
    assert len({round(value, 3) for value in about["known"].values()}) == 4


def test_model_matches_transformers(model: Path, whole: Path) -> None:
    theirs = Checkpoint(whole / "model")
    ours = Phi3ForCausalLM.from_pretrained(whole / "model", dtype="float32")
    for length in (32, 33, LENGTH):
        ids = np.random.default_rng(length).integers(5, 280, (1, length))
        assert distance(run(ours, input_ids=ids).logits, run_theirs(theirs, ids, None).logits) <= 1e-5
    weights = "model.safetensors"
    assert (whole / "model" / weights).samefile(model / weights)


def test_factors_work_as_a_rope_argument(whole: Path, model: Path, text: Path) -> None:
    """Other commands measure the same perplexity with the file."""
    rope = parse_rope(f"longrope:@{whole / 'factors.json'}")
    factors = json.loads((whole / "factors.json").read_text())
    assert rope.initial_tokens == factors["initial_tokens"]
    config = rope.apply(Phi3Config.from_pretrained(model))
    assert (config.original_max_position_embeddings, config.max_position_embeddings) == (32, LENGTH)
    scorer = Scorer(Phi3ForCausalLM.from_pretrained(model, dtype="float32"))
    inv_freq, scaling = search_run.frequencies_for(config, LENGTH)
    loss = sum(
        scorer.score(np.array(part), inv_freq, scaling, initial_tokens=rope.initial_tokens).total[0]
        for part in windows(model, text)
    )
    measured = np.exp(loss / (2 * (LENGTH - 1)))
    assert measured == pytest.approx(factors["about"]["perplexity"], rel=1e-6)


class Killed(BaseException):
    """Stands for a kill between two windows of a batch."""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resumes_to_the_same_result(model, text, whole, tmp_path, monkeypatch, stop) -> None:
    score, calls = Scorer.score, 0

    def until(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Killed
        return score(*arguments, **options)

    monkeypatch.setattr(Scorer, "score", until)
    output = tmp_path / "out"
    with pytest.raises(Killed):
        search(model, text, output, initial_tokens=(0, 4))
    monkeypatch.setattr(Scorer, "score", score)
    done = search(model, text, output, initial_tokens=(0, 4))
    assert done.new < 18 or stop == 1
    assert contents(output) == contents(whole)


@pytest.mark.parametrize("kind", ["memory", slow("gs"), slow("s3")])
def test_resumes_in_a_store_to_the_same_result(model, text, whole, kind, monkeypatch, caplog) -> None:
    """Another machine measured all but the last batches."""
    state = json.loads((whole / "state.json").read_text())
    with open_store(kind) as bucket:
        store = bucket.empty_folder()
        store.put("out/state.json", json.dumps(state | {"entries": state["entries"][:15]}).encode())
        done = search(model, text, f"{store.url}/out/", initial_tokens=(0, 4))
        assert done.new == 3
        for name, content in contents(whole).items():
            assert store.get(f"out/{name}") == content, name
        with pytest.raises(ValueError, match=r"out was started with other options .* seed: 1 -> 2"):
            search(model, text, f"{store.url}/out", initial_tokens=(0, 4), method=Evolution(8, 2, 3, 0.3, 2))
        monkeypatch.setattr(search_run.Pipeline, "load", None)
        assert search(model, text, f"{store.url}/out", initial_tokens=(0, 4)).new == 0


def test_a_finished_search_needs_no_model(model, text, whole, monkeypatch) -> None:
    before = contents(whole)
    monkeypatch.setattr(search_run.Pipeline, "load", None)
    assert search(model, text, whole, initial_tokens=(0, 4)).new == 0
    assert contents(whole) == before


@pytest.mark.slow
def test_all_individuals_share_one_program(model, text, tmp_path) -> None:
    search(model, text, tmp_path / "warm", batch_size=4)
    with compilations() as programs:
        search(model, text, tmp_path / "out", batch_size=4, method=Evolution(9, 1, 2, 0.5, 7))
    assert programs == []


def test_rejects_other_options(model, text, whole) -> None:
    before = contents(whole)
    with pytest.raises(ValueError, match=r"seed: 1 -> 2.*--overwrite"):
        search(model, text, whole, initial_tokens=(0, 4), method=Evolution(8, 2, 3, 0.3, 2))
    with pytest.raises(ValueError, match=r"initial_tokens: \[0, 4\] -> \[0\]"):
        search(model, text, whole)
    assert contents(whole) == before


def test_starts_from_the_models_own_rope(model, text, tmp_path) -> None:
    own = tmp_path / "own"
    search(model, text, tmp_path / "first")
    done = search(tmp_path / "first" / "model", text, own, length=128)
    known = json.loads((own / "factors.json").read_text())["about"]["known"]
    assert list(known) == ["none", "linear", "ntk", "yarn", "model"]
    first = Phi3Config.from_pretrained(tmp_path / "first" / "model")
    np.testing.assert_allclose(
        done.search.known["model"].factors, dict(first.rope_scaling.parameters)["long_factor"], rtol=1e-6
    )
    assert done.target.original == 32


def test_rejects_wrong_options_before_any_work(model, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(search_run.Pipeline, "load", None)
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="length=32 must be more than the 32 tokens"):
        search(model, text, output, length=32)
    with pytest.raises(ValueError, match=r"tokens; 2 windows of 90,000 need 180,000"):
        search(model, text, output, length=90_000)
    skipping = ObjectiveOptions("perplexity", (LENGTH,), needles=0, skip_tokens=9_999_999)
    with pytest.raises(ValueError, match=r"has 0 tokens after the 9,999,999 that are skipped"):
        search(model, text, output, objective=skipping)
    with pytest.raises(ValueError, match=r"1 shares need as many numbers of samples, not 0"):
        search(model, text, output, stages=Stages(kept=(0.5,)))
    with pytest.raises(ValueError, match=r"must ascend from 1 to below the 2 of all: \[2\]"):
        search(model, text, output, stages=Stages(kept=(0.5,)), stage_samples=(2,))
    with pytest.raises(ValueError, match="finalists need held-out samples"):
        search(model, text, output, stages=Stages(finalists=2))
    with pytest.raises(ValueError, match="too small for the 4"):
        search(model, text, output, method=Evolution(3, 1, 2))
    with pytest.raises(ValueError, match="and 0 among them"):
        search(model, text, output, initial_tokens=(4,))
    assert not output.exists()


def test_limits_the_batch_by_memory(model, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("phi3_jax.evaluation.scorer.token_capacity", lambda _: 300)
    with monkeypatch.context() as patched:
        patched.setattr(search_run.Pipeline, "load", None)
        with pytest.raises(ValueError, match="3 rows of 96 tokens need"):
            search(model, text, tmp_path / "out")
    search(model, text, tmp_path / "out", batch_size=None, overwrite=True)
    assert json.loads((tmp_path / "out" / "state.json").read_text())["chosen"] == {"batch_size": 2}


@pytest.mark.parametrize("method", [EVOLUTION, Cobyqa(iterations=12, knots=3)])
def test_stages_and_held_out_text_measure_what_one_stage_does(model, text, tmp_path, method) -> None:
    """Compares the losses of a staged search with those of all samples, and of the end of the text."""
    stages = Stages((0.4,) if isinstance(method, Evolution) else (), 2)
    asked = ObjectiveOptions("perplexity", (64, LENGTH), (1.0, 3.0), samples=3, needles=0, held_out=2)
    first = (1,) if stages.kept else ()
    done = search(
        model, text, tmp_path / "out", objective=asked, method=method, stages=stages, stage_samples=first
    )
    config = Phi3Config.from_pretrained(model)
    scorer = Scorer(Phi3ForCausalLM.from_pretrained(model, dtype="float32"))
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    whole, held_out = asked.make(tokenizer, text.read_text(), "")
    for stage, objective in ((stages.last, whole), (stages.held_out, held_out)):
        for individual, perplexity in list(done.search.results(stage).items())[-3:]:
            ropes = [
                ScoredRope.from_factors(config.rope_base, individual.factors, individual.attention_factor)
            ]
            (losses,) = measure(scorer, objective, ropes, 1)
            assert perplexity == pytest.approx(objective.value(losses), rel=1e-6)
    assert len(done.search.results(stages.held_out)) == 4 + 2
    about = json.loads((tmp_path / "out" / "factors.json").read_text())["about"]
    assert about["held_out"]["perplexity"] == done.search.best().perplexity
    assert about["held_out"]["perplexity"] <= min(about["held_out"]["known"].values())
    again = search(
        model, text, tmp_path / "out", objective=asked, method=method, stages=stages, stage_samples=first
    )
    assert again.new == 0
    assert again.search.best() == done.search.best()
