"""Whole runs of a tiny model: what they leave, how they go on, and how they end when something is wrong."""

import json
import logging
import os
import signal

import jax
import numpy as np
import pytest
from phi3_jax.train import finetune as module
from phi3_jax.train.finetune import InterruptedRunError, NotFiniteError, finetune
from reference import distance
from reference import run as outputs
from runs import files, losses, run, settings_of, write_base, write_rows
from safetensors.numpy import load_file

from phi3_jax import Phi3ForSequenceClassification
from phi3_jax.checkpoint import CheckpointError
from phi3_jax.data.labels import Labels
from phi3_jax.data.rows import BadRowError, Place, Row
from phi3_jax.data.tasks import TokenClassification
from phi3_jax.lora import load_adapters
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.runs.files import replacing
from phi3_jax.tokenizer import Phi3Tokenizer

REFERENCES = {
    "sequence-classification": "Phi3ForSequenceClassification",
    "token-classification": "Phi3ForTokenClassification",
    "causal-lm": "Phi3ForCausalLM",
}
RESULT = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TOLD = {"run.json", "log.jsonl", "tensorboard", "report.md", "metrics.json", "curves.png", "checkpoints"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    return tmp_path


def learn(folder, base, task):
    """Twelve steps of a task: the loss of the test rows, and these rows."""
    write_rows(folder / "train.jsonl", task=task)
    write_rows(folder / "test.jsonl", 12, task=task, start=100)
    chat = {"messages_column": "messages"} if task == "causal-lm" else {}
    results = run(folder, base, task=task, max_steps=12, test_file=str(folder / "test.jsonl"), **chat)
    figures = set() if task == "causal-lm" else {"confusion.png"}
    generation = {"generation_config.json"} if task == "causal-lm" else set()
    assert files(folder) == RESULT | TOLD | figures | generation
    curve = losses(folder)
    assert [step for step, _ in curve] == list(range(1, 13))
    assert np.mean([loss for _, loss in curve[-4:]]) < np.mean([loss for _, loss in curve[:4]])
    assert set(results) == {"validation", "test"}
    told = json.loads((folder / "run" / "metrics.json").read_text())
    assert told["metrics"]["test"]["loss"] == pytest.approx(results["test"]["loss"])
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    return results["test"]["loss"], rows


def test_the_result_has_the_loss_that_the_run_told(folder, base):
    """All rows in one batch, the loss written out."""
    told, rows = learn(folder, base, "sequence-classification")
    model = Phi3ForSequenceClassification.from_pretrained(folder / "run")
    tokenizer = Phi3Tokenizer.from_pretrained(folder / "run")
    texts = [tokenizer.encode(row["text"]) for row in rows]
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    logits = np.asarray(outputs(model, input_ids=ids, attention_mask=ids != 0).logits, np.float64)
    labels = [model.config.label2id[row["label"]] for row in rows]
    chosen = logits[np.arange(len(rows)), labels]
    np.testing.assert_allclose(np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen), told, rtol=1e-5)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("sequence-classification", marks=pytest.mark.live),
        *(pytest.param(each, marks=pytest.mark.slow) for each in list(REFERENCES)[1:]),
    ],
)
def test_the_result_is_transformers_own(folder, base, task):
    import torch
    import transformers

    told, rows = learn(folder, base, task)
    theirs = getattr(transformers, REFERENCES[task]).from_pretrained(folder / "run", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run")
    total = count = 0
    for row in rows:
        if task == "sequence-classification":
            ids = tokenizer(row["text"], return_tensors="pt").input_ids
            labels = torch.tensor([theirs.config.label2id[row["label"]]])
            number = 1
        elif task == "token-classification":
            # Words have spaces between them as in running text, which transformers' tokenizer drops.
            place = Place("test.jsonl", 1)
            own = Phi3Tokenizer.from_pretrained(folder / "run")
            names = Labels(tuple(theirs.config.id2label.values()))
            (example,) = TokenClassification().encode(Row(row, place), own, names)
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            number = len(row["words"])
        else:
            whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
            prompt = tokenizer.apply_chat_template(
                row["messages"][:1], add_generation_prompt=True, return_dict=False
            )
            ids = torch.tensor([whole])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            number = len(whole) - len(prompt)
        with torch.no_grad():
            total += theirs(ids, labels=labels).loss.item() * number
        count += number
    np.testing.assert_allclose(total / count, told, rtol=1e-5)


def interrupted_after(monkeypatch, step):
    """The run gets SIGTERM while it takes this step."""

    def at(self, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.received is not None

    monkeypatch.setattr(module.Interrupts, "at", at)


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_and_goes_on(folder, base, monkeypatch):
    """With dropout, micro-batches and widths; wherever it ended, losses are the same to the last bit."""
    options = {"task": "token-classification", "max_buckets": 2, "gradient_accumulation_steps": 2}
    write_rows(folder / "train.jsonl", task="token-classification")
    run(folder, base, **options)
    expected, weights = losses(folder), (folder / "run" / "model.safetensors").read_bytes()
    options |= {"output_dir": folder / "again" / "run"}
    for step in (1, 4):
        with monkeypatch.context() as patch:
            interrupted_after(patch, step)
            with pytest.raises(InterruptedRunError, match=f"interrupted behind step {step}, which is saved"):
                run(folder, base, **options)
    assert len(losses(folder / "again")) == 4
    run(folder, base, **options)
    assert losses(folder / "again") == expected
    assert (folder / "again" / "run" / "model.safetensors").read_bytes() == weights


def test_what_killed_processes_left_half_done_goes(folder, base, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        with pytest.raises(InterruptedRunError):
            run(folder, base, max_steps=2)
    with replacing(folder / "run" / "curves.png") as work:
        work.touch()
        os.link(work, work.with_name(work.name.replace(str(os.getpid()), "1")))  # as if killed before the end
    (folder / "run" / "curves.png").unlink()
    (folder / "run" / ".run.abcdefgh.replaced").mkdir()
    (folder / "run" / ".mine").touch()
    assert [path.name for path in (folder / "run").glob(".curves.png.*")]
    run(folder, base, max_steps=2)
    assert [path.name for path in (folder / "run").glob(".*")] == [".mine"]


def test_a_finished_run_does_nothing(folder, base, caplog):
    results = run(folder, base, max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").iterdir()}
    with caplog.at_level(logging.WARNING):
        assert run(folder, base, max_steps=2) == results
    assert "is finished; nothing is left to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").iterdir()} == before


def test_another_run_is_not_gone_on_with(folder, base):
    run(folder, base, max_steps=2)
    with pytest.raises(ValueError, match=r"go on with these: learning_rate: 0\.003 -> 0\.1; seed: 0 -> 1\. "):
        run(folder, base, max_steps=2, learning_rate=0.1, seed=1)
    write_rows(folder / "train.jsonl", 40)
    with pytest.raises(ValueError, match="the data are not the same"):
        run(folder, base, max_steps=2)
    run(folder, base, max_steps=2, overwrite_output_dir=True)
    assert len(losses(folder)) == 2
    (folder / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is broken"):
        run(folder, base, max_steps=2)


def test_a_model_is_not_written_over(folder, base):
    with pytest.raises(ValueError, match="holds a model that is no run of finetune"):
        run(folder, base, output_dir=base)


def test_numbers_that_are_none_stop_the_run(folder, base):
    """The text names step, learning rate and rows; the checkpoint before it stays."""
    with pytest.raises(NotFiniteError) as caught:
        run(folder, base, learning_rate=1e30, max_grad_norm=None, warmup_ratio=0.0, save_steps=1)
    text = str(caught.value)
    assert "step 2 (epoch 1) has the loss" in text
    assert "at learning rate 9.33e+29" in text
    assert "train.jsonl, line " in text
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["1"]


def test_the_best_parameters_are_kept(folder, base):
    """A rate that grows wild: the first evaluation is the best, and its parameters are the result."""
    wild = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.5, "eval_steps": 1}
    results = run(folder, base, metric_for_best_model="loss", max_steps=8, **wild)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["loss"] for record in log if record["kind"] == "validation"}
    best = min(scores, key=scores.get)
    assert best < 8
    assert results["validation"]["loss"] == scores[best]
    assert json.loads((folder / "run" / "metrics.json").read_text())["best_step"] == best


@pytest.mark.slow
def test_patience_ends_a_run(folder, base):
    wild = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "eval_steps": 1}
    run(folder, base, metric_for_best_model="loss", max_steps=40, early_stopping_patience=2, **wild)
    steps = [step for step, _ in losses(folder)]
    best = json.loads((folder / "run" / "metrics.json").read_text())["best_step"]
    assert steps[-1] == best + 2 < 40


def changed_weights(folder, base):
    """The names of the base model's weights that a run has changed."""
    before, after = (load_file(each / "model.safetensors") for each in (base, folder / "run"))
    shared = before.keys() & after.keys()
    assert shared == before.keys() - {"lm_head.weight"}
    return {name for name in shared if not np.array_equal(before[name], after[name])}


ADAPTERS = {"trained": "lora", "lora_rank": 2, "lora_targets": ["qkv_proj"], "learning_rate": 0.02}


def test_adapters_are_trained_alone_and_saved_beside_the_merged_model(folder, base):
    run(folder, base, **ADAPTERS)
    expected = {f"model.layers.{layer}.self_attn.qkv_proj.weight" for layer in range(2)}
    assert changed_weights(folder, base) == expected
    merged = Phi3ForSequenceClassification.from_pretrained(folder / "run")
    plain = Phi3ForSequenceClassification.from_pretrained(base, config=merged.config)
    adapted = load_adapters(plain, folder / "run" / "adapter")
    ids = np.arange(10, 18)[None]
    logits, merged_logits = (outputs(model, input_ids=ids).logits for model in (adapted, merged))
    assert distance(logits, merged_logits) <= 1e-5


# peft asks transformers for a name that is going away.
@pytest.mark.live
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_come_in_pefts_form(folder, base):
    import torch
    import transformers
    from peft import PeftModel

    run(folder, base, **ADAPTERS)
    plain = transformers.Phi3ForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = PeftModel.from_pretrained(plain, folder / "run" / "adapter").eval()
    ids = torch.arange(10, 18)[None]
    ours = transformers.Phi3ForSequenceClassification.from_pretrained(folder / "run")(ids).logits
    torch.testing.assert_close(adapted(ids).logits, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_head_alone(folder, base):
    run(folder, base, trained="head", max_steps=3)
    assert changed_weights(folder, base) == set()


def test_packed_rows_are_the_same_loss(folder, base):
    """All examples in one batch, packed or not: the first step's loss is the same."""
    write_rows(folder / "train.jsonl", task="causal-lm", count=10)
    write_rows(folder / "validation.jsonl", task="causal-lm", count=4)
    options = {"task": "causal-lm", "messages_column": "messages", "max_steps": 1, "max_length": 128}
    options |= {"validation_file": str(folder / "validation.jsonl"), "dropout": False}
    run(folder, base, train_batch_size=10, **options)
    (folder / "packed").mkdir()
    run(folder, base, packing=True, output_dir=folder / "packed" / "run", train_batch_size=8, **options)
    np.testing.assert_allclose(losses(folder / "packed")[0][1], losses(folder)[0][1], rtol=1e-5)


@pytest.mark.slow
def test_on_a_mesh_the_run_is_the_same(folder, tmp_path_factory):
    base = write_base(
        tmp_path_factory.mktemp("mesh") / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=8
    )
    run(folder, base, max_steps=3)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    finetune(
        settings_of(folder, base, max_steps=3, output_dir=folder / "mesh" / "run"), mesh=mesh, show=False
    )
    ours, expected = (np.asarray([loss for _, loss in losses(each)]) for each in (folder / "mesh", folder))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric_for_best_model": "f2"}, "f2"),
        ({"train_file": "no.jsonl"}, r"no data at no\.jsonl"),
        ({"text_column": "body"}, "there is no column 'body'"),
        ({"class_weights": {"a": 1.0}}, "class_weights must name each label once; 'b'"),
    ],
)
def test_settings_that_do_not_fit_the_data(folder, base, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        run(folder, base, **changes)


def test_a_label_that_training_has_not(folder, base):
    validation = folder / "validation.jsonl"
    validation.write_text('{"text": "rain", "label": "never seen"}\n')
    with pytest.raises(BadRowError, match=r"validation\.jsonl, line 1: .*'never seen'"):
        run(folder, base, validation_file=str(validation))


def test_bad_rows_are_named_or_counted(folder, base, caplog):
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = '{"text": "rain", "label'
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(BadRowError, match=r"train\.jsonl, line 5: "):
        run(folder, base)
    with caplog.at_level(logging.WARNING):
        run(folder, base, skip_bad_rows=True, max_steps=1)
    assert "1 bad rows were skipped; the first: " in caplog.text
    assert json.loads((folder / "run" / "metrics.json").read_text())["data"]["bad rows skipped"] == 1


@pytest.mark.slow
def test_weights_of_classes_come_from_their_counts(folder, base):
    run(folder, base, class_weights="balanced", label_smoothing=0.1, max_steps=1)
    assert len(losses(folder)) == 1


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_told(folder, base, monkeypatch, caplog):
    def restore(self, step, state):
        raise CheckpointError(f"{step} cannot be read: it is damaged")

    wild = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.5, "eval_steps": 1}
    monkeypatch.setattr(module.Checkpoints, "restore", restore)
    with caplog.at_level(logging.WARNING):
        run(folder, base, metric_for_best_model="loss", max_steps=8, **wild)
    assert "the last parameters are kept instead of the best" in caplog.text


def test_rows_that_the_mesh_does_not_divide(folder, base):
    with pytest.raises(ValueError, match=r"train_batch_size=6 does not divide over 8 .*; use 8, say"):
        finetune(
            settings_of(folder, base, train_batch_size=6), mesh=make_mesh("data=8", jax.devices()), show=False
        )
