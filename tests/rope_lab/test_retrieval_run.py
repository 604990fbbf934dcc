"""`phi3-jax rope retrieve` on a small random model: answers, and resuming."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compilations import compilations
from marks import slow
from reference import LONG, SHORT
from retrieval_reader import right_values
from small_checkpoint import write_checkpoint
from stores import open_store

from phi3_jax import Phi3Config, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.comparison.compare import Rope
from phi3_jax.rope_lab.retrieval import measure as retrieval
from phi3_jax.rope_lab.retrieval import run as retrieval_run
from phi3_jax.rope_lab.retrieval.measure import Answerer, measure_retrieval
from phi3_jax.rope_lab.retrieval.prompts import Case, RetrievalPrompts
from phi3_jax.rope_lab.retrieval.report import write_retrieval_report
from phi3_jax.rope_lab.retrieval.run import RetrievalResult, run_retrieval
from phi3_jax.rope_lab.retrieval.tasks import PassKey, make_tasks
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


def measure(model: Path, output: Any, ropes: list[str] = ROPES, **changes: Any) -> RetrievalResult:
    grid = {"lengths": LENGTHS, "depths": (0.0, 1.0), "trials": 2, "max_new_tokens": NEW, "batch_size": 4}
    options = grid | {"tasks": [PassKey()], "dtype": "float32", "show": False} | changes
    return run_retrieval(model, output, [parse_rope(rope) for rope in ropes], **options)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RetrievalResult, Path]:
    output = tmp_path_factory.mktemp("whole")
    return measure(model, output), output


@pytest.mark.parametrize("rope", [slow("none"), slow("linear:factor=2"), "yarn:factor=2"])
def test_answers_match_a_model_with_this_config(
    model: Path, whole: tuple[RetrievalResult, Path], rope: str
) -> None:
    trials = [trial for trial in whole[0].trials if trial.rope == rope]
    assert len(trials) == 2 * 2 * 2
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    prompts = RetrievalPrompts(tokenizer, [PassKey()], max_new_tokens=NEW)
    config = parse_rope(rope).apply(Phi3Config.from_pretrained(model)).replace(max_position_embeddings=450)
    separate = Phi3ForCausalLM.from_pretrained(model, dtype="float32", config=config)
    for trial in trials:
        prompt = prompts(Case(trial.task, trial.length, trial.depth, trial.trial))
        assert (trial.answers, len(prompt.ids)) == (prompt.answers, trial.length - NEW)
        ids = np.array([prompt.ids])
        out = separate.generate(ids, np.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        expected = tokenizer.decode(np.asarray(out)[0, ids.shape[1] :], skip_special_tokens=True)
        assert trial.text == expected, trial


def test_ropes_give_different_answers(whole: tuple[RetrievalResult, Path]) -> None:
    answers: dict[tuple[Any, ...], set[str]] = {}
    for trial in whole[0].trials:
        answers.setdefault((trial.length, trial.depth, trial.trial), set()).add(trial.text)
    assert any(len(each) == len(ROPES) for each in answers.values())


def test_ropes_share_all_programs(model: Path, tmp_path: Path) -> None:
    measure(model, tmp_path / "warm", ["none"], trials=1)
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"short_factor": SHORT, "long_factor": LONG, "max_position_embeddings": 640}))
    ropes = ["yarn:factor=4", "dynamic:factor=2", f"longrope:@{lists}"]
    for length in LENGTHS:  # the formulas themselves
        for rope in ropes:
            frequencies_for(parse_rope(rope).apply(Phi3Config.from_pretrained(model)), length)
    with compilations() as programs:
        measure(model, tmp_path / "out", ropes)
    assert programs == []


def test_initial_tokens(model: Path, tmp_path: Path) -> None:
    """A rope that keeps all tokens unscaled is plain rope; one that keeps some is neither."""
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"long_factor": LONG, "attention_factor": 1, "max_position_embeddings": 640}))
    some, every = f"longrope:@{lists},initial_tokens=150", f"longrope:@{lists},initial_tokens=450"
    done = measure(
        model, tmp_path / "out", ["none", every, some, f"longrope:@{lists}"], lengths=(450,), trials=3
    )
    # Batches of four have rows of two ropes.
    answers = [[each.text for each in done.trials if each.rope == rope] for rope in done.options["ropes"]]
    assert answers[0] == answers[1]
    assert answers[1] != answers[2] != answers[3]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_resumes_after_a_kill(
    model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    generate, calls = retrieval.generate, 0

    def until(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Killed
        return generate(*arguments, **options)

    monkeypatch.setattr(retrieval, "generate", until)
    with pytest.raises(Killed):
        measure(model, tmp_path)
    monkeypatch.setattr(retrieval, "generate", generate)
    done = measure(model, tmp_path)
    assert done.new == 24 - 4 * stop
    assert done.trials == whole[0].trials
    assert (tmp_path / "state.json").read_bytes() == (whole[1] / "state.json").read_bytes()
    monkeypatch.setattr(retrieval_run.Pipeline, "load", None)
    assert measure(model, tmp_path).new == 0


@pytest.mark.parametrize("kind", ["memory", slow("gs"), slow("s3")])
def test_resumes_in_a_store(model: Path, whole: Any, tmp_path: Path, kind: str) -> None:
    """Another machine answered all but the last two batches."""
    state = json.loads((whole[1] / "state.json").read_text())
    write_retrieval_report(whole[1], whole[0])
    with open_store(kind) as bucket:
        store = bucket.empty_folder()
        url = store.put("out/state.json", json.dumps(state | {"entries": state["entries"][:16]}).encode())
        url = url.removesuffix("/state.json")
        done = measure(model, url)
        assert (done.new, done.trials) == (8, whole[0].trials)
        write_retrieval_report(url, done)
        assert [entry.name for entry in list_entries(url)] == sorted(each.name for each in whole[1].iterdir())
        for path in whole[1].iterdir():
            assert store.get(f"out/{path.name}") == path.read_bytes(), path.name


def test_rejects_wrong_options_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(retrieval_run.Pipeline, "load", None)
        with pytest.raises(ValueError, match="length 60 is too short for passkey"):
            measure(model, output, lengths=(320, 60))
        with pytest.raises(ValueError, match="task passkey is given twice"):
            measure(model, output, tasks=[PassKey(), PassKey()])
        with pytest.raises(ValueError, match="rope none is given twice"):
            measure(model, output, ["none", "none"])
        with pytest.raises(ValueError, match=r"depth 0\.0 is given twice"):
            measure(model, output, depths=(0.0, 0.0))
        with pytest.raises(ValueError, match="length 320 is given twice"):
            measure(model, output, lengths=(320, 320))
        with pytest.raises(ValueError, match=r"'factor'\]=0\.5"):
            measure(model, output, ["linear:factor=0.5"])
        patched.setattr(retrieval, "token_capacity", lambda _: 700)
        with pytest.raises(ValueError, match=r"4 prompts of 450 tokens need .* GiB for keys and values"):
            measure(model, output)
    monkeypatch.setattr(retrieval, "token_capacity", lambda _: 700)
    done = measure(model, output, batch_size=None, lengths=(320,), overwrite=True)
    assert json.loads((output / "state.json").read_text())["chosen"] == {"rows_320_8": 1}
    assert len(done.trials) == 12


def test_rejects_other_options(model: Path, whole: tuple[RetrievalResult, Path]) -> None:
    with pytest.raises(ValueError, match=r"seed: 0 -> 3.*--overwrite"):
        measure(model, whole[1], seed=3)


def test_adds_to_an_output(model: Path, whole: Any, tmp_path: Path) -> None:
    """Other ropes, tasks, lengths and trials reuse answers, as do ropes with the same frequencies."""
    (tmp_path / "state.json").write_bytes((whole[1] / "state.json").read_bytes())
    tasks = make_tasks(["multi-value", "passkey"], keys=2)
    done = measure(
        model,
        tmp_path,
        ["yarn:factor=2", "linear:factor=2", "linear:factor=2.0"],
        tasks=tasks,
        lengths=(450,),
    )
    values = [trial for trial in done.trials if trial.task == "multi-value"]
    assert len(values) == done.new + 2 == 6  # one answer serves both spellings of linear
    assert [trial.text for trial in values[2:4]] == [trial.text for trial in values[4:]]
    earlier = {(each.rope, each.length, each.depth, each.trial): each for each in whole[0].trials}
    passkeys = [trial for trial in done.trials if trial.task == "passkey"]
    assert len(passkeys) == 12
    for trial in passkeys[:8]:
        assert earlier[trial.rope, trial.length, trial.depth, trial.trial] == trial
    assert measure(model, tmp_path, ["yarn:factor=2"], tasks=tasks, trials=3, lengths=(450,)).new == 2 + 1
    assert measure(model, tmp_path, ["yarn:factor=2"], trials=1).new == 0
    tasks = make_tasks(["multi-value"], keys=3)
    assert measure(model, tmp_path, ["yarn:factor=2"], tasks=tasks, lengths=(450,), trials=1).new == 1


def test_each_rope_alone_gives_the_same_answers(model: Path, tmp_path: Path) -> None:
    config = Phi3Config.from_pretrained(model)
    compiled = Pipeline.load(
        model, dtype="float32", config=config.replace(max_position_embeddings=450)
    ).compiled
    arguments = [parse_rope(rope) for rope in ROPES]
    ropes = [Rope(each.name, each.apply(config), each.initial_tokens) for each in arguments]
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    prompts = RetrievalPrompts(
        tokenizer, make_tasks(["multi-key", "multi-query"], keys=2), max_new_tokens=NEW
    )
    cases = prompts.cases([450], [0.0, 1.0], 1)
    assert [case.depth for case in cases] == [0, 1, None]
    together = measure_retrieval(compiled, prompts, ropes, cases, batch_size=4)
    assert [(trial.rope, trial.task) for trial in together[:4]] == [
        ("none", "multi-key"),
        ("none", "multi-key"),
        ("linear:factor=2", "multi-key"),
        ("linear:factor=2", "multi-key"),
    ]
    alone = [
        trial for rope in ropes for trial in measure_retrieval(compiled, prompts, [rope], cases, batch_size=4)
    ]
    assert len(together) == len(ropes) * len(cases)
    assert {trial.text for trial in together} == {trial.text for trial in alone}
    assert sorted(map(str, together)) == sorted(map(str, alone))
    assert len({trial.text for trial in together}) > len(cases)


@pytest.mark.parametrize("wrong", [0, 1])
def test_answers_are_scored(model: Path, monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """A model that reads the text finds everything; one that errs in one value does not."""
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    prompts = RetrievalPrompts(
        tokenizer, make_tasks(["passkey", "multi-key", "multi-value", "multi-query", "variable-tracking"])
    )

    def read(_: Any, ids: np.ndarray, mask: np.ndarray, *, max_new_tokens: int, **options: Any) -> np.ndarray:
        rows = []
        for row in ids:
            values = right_values(tokenizer.decode(row))
            text = ", ".join([*["12321"] * wrong, *values[wrong:]])
            answer = tokenizer.encode(f" {text}.", add_special_tokens=False)
            assert len(answer) <= max_new_tokens
            rows.append([*row, *answer, *[tokenizer.eos_token_id] * (max_new_tokens - len(answer))])
        return np.array(rows)

    monkeypatch.setattr(retrieval, "generate", read)
    config = Phi3Config.from_pretrained(model)
    answerer = Answerer(SimpleNamespace(), prompts, [Rope("none", config, 0)])  # type: ignore[arg-type]
    scores = {}
    for case in prompts.cases([900], [0.3], 2):
        (trial,) = answerer.answer([(Rope("none", config, 0), case)], 2)
        scores[case.task] = trial.score
    right = {
        "passkey": 0,
        "multi-key": 0,
        "multi-value": 3 / 4,
        "multi-query": 3 / 4,
        "variable-tracking": 4 / 5,
    }
    assert scores == (pytest.approx(right) if wrong else dict.fromkeys(right, 1))
