"""Whole studies of a tiny model: every stage, resuming after kills, and errors before any training."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from phi3_jax.train.finetune import InterruptedRunError
from runs import interrupted_after
from small_checkpoint import write_checkpoint
from stores import open_store

from phi3_jax import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.rope_lab.study import training
from phi3_jax.rope_lab.study.run import run_study
from phi3_jax.rope_lab.study.settings import StudySettings

TRAIN = {"max_steps": 4, "train_batch_size": 2, "learning_rate": 3e-3, "dtype": "float32", "save_steps": 1}
SETTINGS: dict[str, Any] = {
    "text": "book.txt",
    "validation_share": 0.1,
    "test_share": 0.1,
    "dtype": "float32",
    "length": 192,
    "base": {
        "config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
        "vocab_size": 320,
        "length": 48,
        "retrieval_share": 0,
        "train": TRAIN,
    },
    "ropes": {
        "none": {"rope": "none", "trained": ["none"]},
        "yarn": {"rope": "yarn:factor=4", "mixed": True},
    },
    "finetune": {"validation_windows": 1, "train": TRAIN | {"max_steps": 2}},
    "compare": {"lengths": [48, 192], "max_tokens": 192},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draws = random.Random(1)
    words = ["".join(draws.choices("aeinorst", k=draws.randint(1, 6))) for _ in range(40)]
    Path("book.txt").write_text("".join(f"{' '.join(draws.choices(words, k=9))}.\n" for _ in range(400)))


def study(output: str, **changes: Any) -> Any:
    overwrite = changes.pop("overwrite", False)
    settings = StudySettings(**SETTINGS | {"output_dir": output} | changes)
    return run_study(settings, overwrite=overwrite, show=False)


def interrupt_scores(patch: pytest.MonkeyPatch, after: int) -> None:
    """Ends the process, as far as it can be seen here, once so many windows were scored."""
    score, scored = Scorer.score, []

    def watched(self: Scorer, *arguments: Any, **options: Any) -> Any:
        if len(scored) == after:
            raise KeyboardInterrupt
        scored.append(arguments)
        return score(self, *arguments, **options)

    patch.setattr(Scorer, "score", watched)


@pytest.mark.slow
def test_resumes_after_kills_to_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study("whole")
    assert {(row.rope, row.trained) for row in whole.perplexities} == {
        ("none", "none"),
        ("yarn", "none"),
        ("yarn", "full"),
    }
    assert [row.rope for row in whole.trainings] == ["", "yarn"]
    # A base of four steps has other weights at the end than at the start, and so has its fine-tuned model.
    assert len({row.perplexity for row in whole.perplexities if row.rope == "yarn"}) == 4
    config = Phi3Config.from_pretrained("whole/finetune/yarn-full")
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (192, 48)
    assert dict(config.rope_scaling.parameters)["short_mscale"] == 1.0

    for step in (2, 1):  # of the base, then of the training under YaRN
        with monkeypatch.context() as patch:
            interrupted_after(patch, step)
            with pytest.raises(InterruptedRunError):
                study("killed")
    with monkeypatch.context() as patch:
        interrupt_scores(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            study("killed")
    monkeypatch.setattr(training, "finetune", None)  # both models are trained
    again = study("killed")
    assert again.perplexities == whole.perplexities
    assert [row[:3] + row[4:] for row in again.trainings] == [row[:3] + row[4:] for row in whole.trainings]
    stages = json.loads(Path("killed/study.json").read_text())["stages"]
    assert all("result" in stage for stage in stages.values())


@pytest.mark.slow
def test_studies_in_a_store() -> None:
    """A study in a store is resumed by a process that has none of its files."""
    changes = {
        "ropes": {"yarn": SETTINGS["ropes"]["yarn"]},
        "trained": ["full"],
        "compare": {"lengths": [192]},
    }
    local = study("local", **changes)
    with open_store("memory") as bucket:
        store = bucket.empty_folder()
        remote = study(f"{store.url}/study", **changes)
        assert remote.perplexities == local.perplexities
        assert study(f"{store.url}/study", **changes).perplexities == local.perplexities
        assert "Findings" in store.get("study/report.md").decode()


@pytest.mark.slow
def test_studies_a_model_and_measures_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("model").mkdir()
    write_checkpoint(Path("model"), max_position_embeddings=64, original_max_position_embeddings=64)
    changes = {
        "base": None,
        "model": "model",
        "length": 256,
        "ropes": {"none": "none", "ntk": "dynamic:factor=4"},
        "trained": ["lora"],
        "compare": {"lengths": [64, 256]},
        "retrieve": {"lengths": [256], "depths": [0.5], "trials": 2, "max_new_tokens": 8},
    }
    results = study("out", **changes)
    assert [(row.rope, row.trained, row.length, row.prompts) for row in results.retrievals] == [
        ("none", "lora", 256, 2),
        ("ntk", "lora", 256, 2),
    ]
    assert Path("out/finetune/ntk-lora/adapter").is_dir()
    assert json.loads(Path("out/finetune/ntk-lora/run.json").read_text())["settings"]["packing"] is False
    monkeypatch.setattr(training, "finetune", None)
    longer = study("out", **changes | {"compare": {"lengths": [64, 128, 256]}})
    assert [row for row in longer.perplexities if row.length != 128] == list(results.perplexities)
    message = (
        r"out: data was started with other options: finetune\.short_share: 0\.5 -> 0\.1, and so were 6 stages"
    )
    with pytest.raises(UserError, match=message):
        study("out", **changes | {"finetune": SETTINGS["finetune"] | {"short_share": 0.1}})


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"text": "nowhere.txt"}, "there is no file nowhere.txt"),
    "short test": (
        {"compare": {"lengths": [8192]}},
        r"the test part of the text has [\d,]+ tokens, and 1 window",
    ),
    "short validation": (
        {"finetune": SETTINGS["finetune"] | {"validation_windows": 500}},
        "the validation part of the text has .* and 500 windows of 192 need 96,000",
    ),
    "length": ({"length": 40}, "length=40 must be more than the 48 tokens"),
    "rope": ({"ropes": {"none": "none", "linear": "linear"}}, "rope type 'linear' needs factor"),
    "factor": (
        {"ropes": {"linear": "linear:factor=2"}},
        "stretches the model to 96 tokens only; the study needs 192",
    ),
    "vocabulary": ({"base": SETTINGS["base"] | {"vocab_size": 5000}}, "give base.vocab_size="),
    "retrieval": (
        {"base": SETTINGS["base"] | {"retrieval_share": 0.1}},
        "base.length=48 is too short for retrieval",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects_before_any_training(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = REJECTED[case]
    monkeypatch.setattr(training, "finetune", None)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        study("out", **changes)


def test_rejects_a_model_that_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import phi3_jax.generation.memory as memory

    monkeypatch.setattr(memory, "_free", lambda device: 20_000)
    monkeypatch.setattr(training, "finetune", None)
    with pytest.raises(UserError, match=r"192 tokens need .* GiB for keys and values"):
        study("out")
