"""The model of lm-eval: tasks on local data, compared with lm-eval's own `hf` model."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoint import PROMPT, Checkpoint, write_checkpoint

from phi3_jax import Phi3ForCausalLM
from phi3_jax.lora import add_lora, merge_lora, save_adapters

pytestmark = pytest.mark.filterwarnings("ignore")  # those of lm-eval

CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
task: reading
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
ANSWERS = """
task: sayings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs:
  until: ["zzz"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    checkpoint = Checkpoint(folder)
    return HFLM(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, max_length=64, batch_size=1)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    from phi3_jax.lm_eval import Phi3JaxLM

    return Phi3JaxLM(str(folder), dtype="float32", max_length=64)


@pytest.mark.live
def test_peft_merges_adapters(folder: Path, tmp_path: Path) -> None:
    from phi3_jax.lm_eval import Phi3JaxLM

    model = add_lora(Phi3ForCausalLM.from_pretrained(folder), 2, targets=["o_proj"])
    for layer in model.model.layers:
        adapter = layer.self_attn.o_proj.adapter
        adapter.b.set_value(jnp.ones_like(adapter.b[...]))
    save_adapters(model, tmp_path, base_model=str(folder))
    for pretrained in (None, str(folder)):
        loaded = Phi3JaxLM(pretrained, dtype="float32", peft=str(tmp_path))._pipeline.compiled.model
        for ours, expected in zip(loaded.model.layers, merge_lora(model).model.layers, strict=True):
            np.testing.assert_array_equal(ours.self_attn.o_proj.weight[...], expected.self_attn.o_proj.weight)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0)
        for each in arguments  # type: ignore[arg-type]
    ]


PAIRS = [
    (PROMPT, " capital"),
    (PROMPT + " ", "of what"),
    ("", "France"),
    ("is the capital of what? " * 8, "What of the capital is that?"),
    (PROMPT, "x" * 50),
]


@pytest.mark.live
def test_loglikelihood_matches_transformers(ours: Any, theirs: Any) -> None:
    requests = instances("loglikelihood", *PAIRS)
    results = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (loss, greedy), (their_loss, their_greedy) in zip(results, expected, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert greedy == their_greedy


@pytest.mark.live
def test_marks_the_greedy_continuation(ours: Any, theirs: Any) -> None:
    """Exactly one token after a prompt is greedy."""
    context = ours.tok_encode(PROMPT)
    requests = [((PROMPT, str(token)), context, [token]) for token in range(300)]
    results = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in results].count(True) == 1
    best = max(range(300), key=lambda token: results[token][0])
    assert results[best][1]
    assert theirs._loglikelihood_tokens([requests[best]], disable_tqdm=True)[0][1]


@pytest.mark.live
def test_rolling_loglikelihood_matches_transformers(ours: Any, theirs: Any) -> None:
    """Texts have one or several windows."""
    requests = instances("loglikelihood_rolling", (PROMPT,), (PROMPT * 20,), ("What?",))
    results = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert results == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)


@pytest.mark.live
def test_answers_match_transformers(ours: Any, theirs: Any) -> None:
    options = {"until": [" is"], "max_gen_toks": 12, "do_sample": False}
    requests = instances("generate_until", *((text, options) for text in (PROMPT, "Who " * 5, PROMPT * 20)))
    results = ours.generate_until(requests, disable_tqdm=True)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert results[:2] == expected[:2]
    assert all(" is" not in answer for answer in results)


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"question": PROMPT, "choices": [" capital", " France", "zz"], "answer": number % 3, "target": "x"}
        for number in range(5)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("capitals", CHOICES), ("reading", ROLLING), ("sayings", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.mark.live
def test_tasks_match_transformers(
    ours: Any, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(write_tasks(tmp_path / "tasks")), include_defaults=False)
    results = [
        lm_eval.simple_evaluate(
            model=model, tasks=["capitals", "reading", "sayings"], task_manager=manager, bootstrap_iters=0
        )["results"]
        for model in (ours, theirs)
    ]
    for task, metrics in results[1].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers
        for name, value in numbers.items():
            assert results[0][task][name] == pytest.approx(value, rel=1e-4), (task, name)


@pytest.mark.live
def test_takes_rope_and_rejects_unknown_arguments(folder: Path, ours: Any) -> None:
    from phi3_jax.lm_eval import Phi3JaxLM

    scaled = Phi3JaxLM(str(folder), dtype="float32", rope="linear:factor=4")
    assert scaled.max_length == 256
    requests = instances("loglikelihood", PAIRS[0])
    assert scaled.loglikelihood(requests)[0][0] != pytest.approx(ours.loglikelihood(requests)[0][0], rel=1e-3)
    with pytest.raises(ValueError, match="phi3_jax takes no dtyp in model_args"):
        Phi3JaxLM(str(folder), dtyp="float32")


@pytest.mark.slow
def test_command_runs_tasks(folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    command = [sys.executable, "-m", "phi3_jax.lm_eval", "--model", "phi3_jax"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "capitals,sayings"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "acc_norm" in result.stdout
    assert list((tmp_path / "out").rglob("results*.json"))
