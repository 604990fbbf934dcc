"""Perplexity of files: documents, windows, several texts at a time, and the command."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compilations import compilations
from marks import slow
from small_checkpoint import write_checkpoint

from phi3_jax import cli
from phi3_jax.cli import common
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation import score_all as module
from phi3_jax.evaluation.evaluate import evaluate
from phi3_jax.evaluation.perplexity import perplexity
from phi3_jax.evaluation.score_all import Part, score_all
from phi3_jax.evaluation.scorer import Scorer, frequencies_for
from phi3_jax.pipeline import Pipeline

TEXTS = ["What is the capital of France? " * 3, "abc", "The capital, is what? Zoë " * 12, "x " * 90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 32, "original_max_position_embeddings": 32}
    write_checkpoint(folder, **sizes)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder, dtype="float32")


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("rope", [None, slow("yarn:factor=2"), "dynamic:factor=4"])
@pytest.mark.parametrize(("length", "stride"), [(None, None), (40, 13)])
def test_documents_match_each_alone(
    pipeline: Pipeline, tmp_path: Path, rope: str | None, length: int | None, stride: int | None
) -> None:
    argument = None if rope is None else parse_rope(rope)
    path = write_texts(tmp_path / "texts.jsonl")
    evaluation = evaluate(pipeline, path, rope=argument, length=length, stride=stride, show=False)
    scorer = Scorer(pipeline.compiled)
    config = scorer.config if argument is None else argument.apply(scorer.config)
    expected = [
        perplexity(
            scorer,
            np.array(pipeline.tokenizer.encode(text)),
            config,
            length=length or config.context_length,
            stride=stride or config.context_length // 2,
        )
        for text in TEXTS
    ]
    assert evaluation.loss.tokens == sum(each.tokens for each in expected)
    assert evaluation.loss.loss == pytest.approx(sum(each.loss for each in expected), rel=1e-5)
    content = evaluation.to_dict()
    firsts = sum(len(pipeline.tokenizer.decode(pipeline.tokenizer.encode(text)[:1])) for text in TEXTS)
    assert content["bytes"] == sum(len(text.encode()) for text in TEXTS) - firsts
    assert content["words"] == sum(len(text.split()) for text in TEXTS)
    assert content["documents"] == 4
    assert content["bits_per_byte"] == pytest.approx(evaluation.loss.loss / math.log(2) / content["bytes"])
    assert content["perplexity"] == pytest.approx(math.exp(content["loss"]))


def test_scores_the_start_of_a_text_file(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[2], encoding="utf-8")
    whole = evaluate(pipeline, path, show=False)
    part = evaluate(pipeline, path, max_tokens=20, show=False)
    assert part.loss.tokens == 19 < whole.loss.tokens
    ids = pipeline.tokenizer.encode(TEXTS[2])[:20]
    assert part.bytes == len(pipeline.tokenizer.decode(ids[1:]).encode())


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_rows_match_each_alone(pipeline: Pipeline, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_ON_CPU", budget)
    draws = np.random.default_rng(0)
    scorer = Scorer(pipeline.compiled, chunk=32)
    config = parse_rope("dynamic:factor=4").apply(scorer.config)
    parts = [
        Part(draws.integers(5, 200, length), int(draws.integers(1, length)))
        for length in (2, 17, 18, 33, 34, 90, 3, 40, 65, 66)
    ]
    counts: list[int] = []
    together = dict(score_all(scorer, parts, config, initial_tokens=4, progress=counts.append))
    assert sorted(together) == list(range(len(parts)))
    assert sum(counts) == sum(len(part.tokens) for part in parts)
    for number, part in enumerate(parts):
        inv_freq, scaling = frequencies_for(config, len(part.tokens))
        alone = scorer.score(part.tokens, inv_freq, scaling, initial_tokens=4, scored_from=part.scored_from)
        np.testing.assert_allclose(together[number].losses, alone.losses[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(together[number].greedy, alone.greedy[0])
        assert together[number].loss == pytest.approx(alone.losses.sum(), rel=1e-5)


def test_many_lengths_share_programs(pipeline: Pipeline) -> None:
    draws = np.random.default_rng(0)
    scorer = Scorer(pipeline.compiled, chunk=64)
    warm = [Part(draws.integers(5, 200, length)) for length in (10, 30, 64, 128)]
    list(score_all(scorer, warm, scorer.config))
    with compilations() as counted:
        parts = [Part(draws.integers(5, 200, length)) for length in range(2, 128)]
        list(score_all(scorer, parts, scorer.config))
    assert len(counted) == 0


def test_a_part_may_have_another_rope_length(pipeline: Pipeline) -> None:
    scorer = Scorer(pipeline.compiled)
    config = parse_rope("dynamic:factor=4").apply(scorer.config)
    tokens = np.arange(5, 45)
    ((_, own),) = score_all(scorer, [Part(tokens)], config)
    ((_, short),) = score_all(scorer, [Part(tokens, rope_length=20)], config)
    ((_, plain),) = score_all(scorer, [Part(tokens)], scorer.config)
    np.testing.assert_allclose(short.losses, plain.losses, rtol=1e-6)
    assert abs(own.loss / plain.loss - 1) > 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "abc"}\n{"txt": "abc"}\n', "line 2: expected a JSON object with 'text'"),
        ('{"text": 3}\n', "line 1: 'text' is 3; expected text"),
        ("abc\n", "line 1 is not valid JSON: .*; expected a JSON object"),
        ('{"text": "a\u2028b", "text": "c"}\n', "line 1 is not valid JSON: it has the key 'text' twice"),
        ('{"text": "a"}\n', "has no text of two tokens or more"),
        ("\n", "has no text"),
    ],
)
def test_rejects_wrong_files(pipeline: Pipeline, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, path, show=False)


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(common, "keep_compiled_programs", lambda cache_dir: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["phi3-jax", *map(str, arguments), "--model", str(folder), "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return run


def test_command_prints_or_writes_json(command: Any, pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.jsonl")
    code, out, _ = command("evaluate", path, "--length", 24, "--rope", "linear:factor=2")
    assert code == 0
    content = json.loads(out)
    evaluation = evaluate(pipeline, path, rope=parse_rope("linear:factor=2"), length=24, show=False)
    assert content["perplexity"] == pytest.approx(evaluation.loss.perplexity, rel=1e-5)
    assert (content["length"], content["stride"], content["rope"]) == (24, 12, "linear:factor=2")
    code, out, _ = command("evaluate", path, "--output", tmp_path / "result.json")
    assert (code, out) == (0, "")
    assert json.loads((tmp_path / "result.json").read_text())["rope"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rope", "linear"), "phi3-jax: rope 'linear': rope type 'linear' needs factor"),
        (("--length", 24, "--stride", 25), "phi3-jax: stride=25 must be from 1 to the length, 24"),
    ],
)
def test_command_rejects_wrong_options(
    command: Any, options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    code, out, err = command("evaluate", write_texts(tmp_path / "texts.jsonl"), *options)
    assert (code, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_rope_compare_command_writes_its_files(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[2], encoding="utf-8")
    options = ("--text", path, "--lengths", "32,16", "--output", tmp_path / "out")
    code, out, err = command("rope", "compare", *options, "--rope", "none", "--rope", "linear:factor=2")
    assert code == 0, err
    assert "linear:factor=2" in out
    assert "forward passes" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("results.csv", "results.json", "perplexity.png", "wavelengths.png", "report.md", "state.json"),
    }
    code, _, err = command("rope", "compare", *options[:3], "16,a", *options[4:])
    assert (code, err) == (1, "phi3-jax: --lengths 16,a: 'a' is not a whole number\n")


@pytest.mark.slow
def test_rope_option_matches_a_checkpoint_with_this_rope(command: Any, folder: Path, tmp_path: Path) -> None:
    """The answers go beyond the model's own context."""
    prompt = "What is the capital of France? " * 2
    outputs = {}
    for rope in ("none", "yarn:factor=4", "dynamic:factor=4"):
        code, out, err = command("generate", prompt, "--raw", "--max-new-tokens", 60, "--rope", rope)
        assert code == 0, err
        config = parse_rope(rope).apply(Pipeline.load(folder, dtype="float32").compiled.model.config)
        pipeline = Pipeline.load(folder, dtype="float32", config=config)
        ids = pipeline.tokenizer.encode(prompt)
        new = min(60, config.context_length - len(ids))
        expected = np.asarray(
            pipeline.compiled.model.generate(
                [ids], attention_mask=np.ones((1, len(ids))), do_sample=False, max_new_tokens=new
            )
        )[0, len(ids) :]
        outputs[rope] = out
        assert out.removesuffix("\n") == pipeline.tokenizer.decode(expected, skip_special_tokens=True)
    assert len(set(outputs.values())) == 3
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps({"id": 1, "prompt": prompt, "max_new_tokens": 60}) + "\n")
    output = tmp_path / "out.jsonl"
    options = ("--input", requests, "--output", output, "--rope", "yarn:factor=4")
    assert command("batch", *options)[0] == 0
    assert json.loads(output.read_text())["text"] == outputs["yarn:factor=4"].removesuffix("\n")
    code, _, err = command("batch", *options[:4], "--rope", "yarn:factor=2")
    assert code == 1
    assert "was started with other options" in err
    (tmp_path / "kept.json").write_text(json.dumps({"factors": [1.0] * 6, "factor": 2, "initial_tokens": 2}))
    code, _, err = command("generate", "a", "--rope", f"longrope:@{tmp_path / 'kept.json'}")
    assert code == 1
    assert "a config cannot express initial_tokens=2" in err
