"""`phi3-jax rope passkey` on a small random model: answers, reports, and resuming."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compilations import compilations
from marks import slow
from reference import LONG, SHORT
from small_checkpoint import write_checkpoint
from stores import open_store

from phi3_jax import Phi3Config, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.rope_lab import passkey_run
from phi3_jax.rope_lab.passkey import Case, PasskeyPrompts
from phi3_jax.rope_lab.passkey_report import LISTED, write_passkey_report
from phi3_jax.rope_lab.passkey_run import PasskeyResult, Ropes, Trial, measure_passkeys
from phi3_jax.storage.urls import list_entries

ROPES = ["none", "linear:factor=2", "yarn:factor=2"]
LENGTHS = (320, 450)
NEW = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 320, "original_max_position_embeddings": 320}
    write_checkpoint(folder, num_hidden_layers=1, initializer_range=0.3, pad_token_id=0, **sizes)
    return folder


def measure(model: Path, output: Any, ropes: list[str] = ROPES, **changes: Any) -> PasskeyResult:
    grid = {"lengths": LENGTHS, "depths": (0.0, 1.0), "trials": 2, "max_new_tokens": NEW, "batch_size": 4}
    options = grid | {"dtype": "float32", "show": False} | changes
    return measure_passkeys(model, output, [parse_rope(rope) for rope in ropes], **options)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PasskeyResult, Path]:
    output = tmp_path_factory.mktemp("whole")
    return measure(model, output), output


@pytest.mark.parametrize("rope", [slow("none"), slow("linear:factor=2"), "yarn:factor=2"])
def test_answers_match_a_model_with_this_config(
    model: Path, whole: tuple[PasskeyResult, Path], rope: str
) -> None:
    trials = [trial for trial in whole[0].trials if trial.rope == rope]
    assert len(trials) == 2 * 2 * 2
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    prompts = PasskeyPrompts(tokenizer, NEW, template=True)
    config = parse_rope(rope).apply(Phi3Config.from_pretrained(model)).replace(max_position_embeddings=450)
    separate = Phi3ForCausalLM.from_pretrained(model, dtype="float32", config=config)
    for trial in trials:
        prompt = prompts(Case(trial.length, trial.depth, trial.trial))
        assert (trial.key, len(prompt.ids)) == (prompt.key, trial.length - NEW)
        ids = np.array([prompt.ids])
        out = separate.generate(ids, np.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        expected = tokenizer.decode(np.asarray(out)[0, ids.shape[1] :], skip_special_tokens=True)
        assert trial.answer == expected, trial


def test_ropes_give_different_answers(whole: tuple[PasskeyResult, Path]) -> None:
    answers: dict[tuple[Any, ...], set[str]] = {}
    for trial in whole[0].trials:
        answers.setdefault((trial.length, trial.depth, trial.trial), set()).add(trial.answer)
    assert any(len(each) == len(ROPES) for each in answers.values())


def test_ropes_share_all_programs(model: Path, tmp_path: Path) -> None:
    measure(model, tmp_path / "warm", ["none"], trials=1)
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"short_factor": SHORT, "long_factor": LONG, "max_position_embeddings": 640}))
    ropes = ["yarn:factor=4", "dynamic:factor=2", f"longrope:@{lists}"]
    for length in LENGTHS:  # the formulas themselves
        Ropes(Phi3Config.from_pretrained(model), list(map(parse_rope, ropes))).frequencies(ropes, length)
    with compilations() as programs:
        measure(model, tmp_path / "out", ropes)
    assert programs == []


def test_initial_tokens(model: Path, tmp_path: Path) -> None:
    """A rope that keeps all tokens unscaled is plain rope; one that keeps some is neither."""
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"long_factor": LONG, "attention_factor": 1, "max_position_embeddings": 640}))
    some, every = f"longrope:@{lists},initial_tokens=150", f"longrope:@{lists},initial_tokens=450"
    done = measure(
        model, tmp_path / "out", ["none", every, some, f"longrope:@{lists}"], lengths=(450,), trials=4
    )
    answers = [[each.answer for each in done.trials if each.rope == rope] for rope in done.options["ropes"]]
    assert answers[0] == answers[1]
    assert answers[1] != answers[2] != answers[3]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_resumes_after_a_kill(
    model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    generate, calls = passkey_run.generate, 0

    def until(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Killed
        return generate(*arguments, **options)

    monkeypatch.setattr(passkey_run, "generate", until)
    with pytest.raises(Killed):
        measure(model, tmp_path)
    monkeypatch.setattr(passkey_run, "generate", generate)
    done = measure(model, tmp_path)
    assert done.new == 24 - 4 * stop
    assert done.trials == whole[0].trials
    assert (tmp_path / "state.json").read_bytes() == (whole[1] / "state.json").read_bytes()
    monkeypatch.setattr(passkey_run.Pipeline, "load", None)
    assert measure(model, tmp_path).new == 0


@pytest.mark.parametrize("kind", ["memory", slow("gs"), slow("s3")])
def test_resumes_in_a_store(model: Path, whole: Any, tmp_path: Path, kind: str) -> None:
    """Another machine answered all but the last two batches."""
    state = json.loads((whole[1] / "state.json").read_text())
    write_passkey_report(whole[1], whole[0])
    with open_store(kind) as bucket:
        store = bucket.empty_folder()
        url = store.put("out/state.json", json.dumps(state | {"entries": state["entries"][:16]}).encode())
        url = url.removesuffix("/state.json")
        done = measure(model, url)
        assert (done.new, done.trials) == (8, whole[0].trials)
        write_passkey_report(url, done)
        assert [entry.name for entry in list_entries(url)] == sorted(each.name for each in whole[1].iterdir())
        for path in whole[1].iterdir():
            assert store.get(f"out/{path.name}") == path.read_bytes(), path.name


def test_rejects_wrong_options_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(passkey_run.Pipeline, "load", None)
        with pytest.raises(ValueError, match="length 60 is too short"):
            measure(model, output, lengths=(320, 60))
        with pytest.raises(ValueError, match="rope none is given twice"):
            measure(model, output, ["none", "none"])
        with pytest.raises(ValueError, match=r"depth 0\.0 is given twice"):
            measure(model, output, depths=(0.0, 0.0))
        with pytest.raises(ValueError, match="length 320 is given twice"):
            measure(model, output, lengths=(320, 320))
        with pytest.raises(ValueError, match=r"'factor'\]=0\.5"):
            measure(model, output, ["linear:factor=0.5"])
        patched.setattr(passkey_run, "token_capacity", lambda _: 700)
        with pytest.raises(ValueError, match=r"4 prompts of 450 tokens need .* GiB for keys and values"):
            measure(model, output)
    monkeypatch.setattr(passkey_run, "token_capacity", lambda _: 700)
    done = measure(model, output, batch_size=None, lengths=(320,), overwrite=True)
    assert json.loads((output / "state.json").read_text())["chosen"] == {"rows_320": 1}
    assert len(done.trials) == 12


def test_rejects_other_options(model: Path, whole: tuple[PasskeyResult, Path]) -> None:
    with pytest.raises(ValueError, match=r"trials: 2 -> 3.*--overwrite"):
        measure(model, whole[1], trials=3)


def trial(rope: str, length: int, number: int, answer: str) -> Trial:
    return Trial(rope, length, 0.5, number, "71432", answer, "71432" in answer and "1 " not in answer)


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
    options = {"trials": 3, "max_new_tokens": 16}
    write_passkey_report(tmp_path, PasskeyResult(trials, options, 18, 1.0))
    with (tmp_path / "passkey.csv").open() as file:
        rows = {(row["rope"], row["length"]): row for row in csv.DictReader(file)}
    assert (rows["a|b", "100"]["found"], rows["d", "100"]["rate"]) == ("2", "0.0")
    content = json.loads((tmp_path / "passkey.json").read_text())
    assert [Trial(**each) for each in content["trials"]] == trials
    assert (tmp_path / "passkey.png").stat().st_size > 5_000
    report = (tmp_path / "report.md").read_text()
    assert "| a\\|b | 67% | 100% | 83% |" in report
    assert "- 100 tokens, a|b and c: 2 of 3 each, but not the same:" in report
    assert '| 50% | 71432 | "no &lt;idea>\\n\\|" | "71432" |' in report
    assert "- 200 tokens, a|b and c: 3 of 3 each, the same." in report
    assert '| 100 | 50% | 71432 | "12341 71432" | names the key after another number |' in report
    assert "### d: 6 of 6" in report
    assert f'"{"x" * 159}…"' in report

    many = [
        replace(trials[0], rope="e", trial=number, answer="", found=False) for number in range(LISTED + 5)
    ]
    write_passkey_report(tmp_path, PasskeyResult(many, options, 18, 1.0))
    assert "And 5 more, in passkey.json." in (tmp_path / "report.md").read_text()
