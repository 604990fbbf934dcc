"""Whole runs of a tiny model: their files, resuming, and errors."""

import json
import logging
import math
import os
import shutil
import time
from functools import partial

import jax
import numpy as np
import pytest
from filelock import FileLock
from flax import nnx
from marks import slow
from phi3_jax.train import finetune as module
from phi3_jax.train.dry_run import dry_run
from phi3_jax.train.evaluate import NotFiniteError
from phi3_jax.train.finetune import InterruptedRunError, finetune
from phi3_jax.train.recipe import make_recipe, make_trainer, new_model, with_adapters
from reference import distance
from reference import run as outputs
from runs import files, interrupted_after, losses, run, settings_of, write_base, write_rows
from safetensors.numpy import load_file, save_file

from phi3_jax import Phi3ForCausalLM, Phi3ForSequenceClassification
from phi3_jax.checkpoint import CheckpointError
from phi3_jax.classification import Classifier, classify_file
from phi3_jax.data.labels import Labels
from phi3_jax.data.loader import Loader
from phi3_jax.data.rows import BadRowError, Place, Row
from phi3_jax.data.tasks import TokenClassification
from phi3_jax.errors import UserError
from phi3_jax.lora import add_lora, load_adapters, save_adapters
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.runs import bucket_mounts
from phi3_jax.runs.files import replacing
from phi3_jax.tokenizer import Phi3Tokenizer

REFERENCES = {
    "sequence-classification": "Phi3ForSequenceClassification",
    "token-classification": "Phi3ForTokenClassification",
    "causal-lm": "Phi3ForCausalLM",
}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
WRITTEN = {"run.json", "log.jsonl", "tensorboard", "report.md", "metrics.json", "curves.png", "checkpoints"}


def learn(folder, base, task):
    """Takes twelve steps; returns the loss of the test rows, and these rows."""
    write_rows(folder / "train.jsonl", task=task)
    write_rows(folder / "test.jsonl", 12, task=task, start=100)
    chat = {"messages_column": "messages"} if task == "causal-lm" else {}
    results = run(folder, base, task=task, max_steps=12, test_file=str(folder / "test.jsonl"), **chat)
    figures = set() if task == "causal-lm" else {"confusion.png"}
    generation = {"generation_config.json"} if task == "causal-lm" else set()
    assert files(folder) == MODEL | WRITTEN | figures | generation
    curve = losses(folder)
    assert [step for step, _ in curve] == list(range(1, 13))
    assert np.mean([loss for _, loss in curve[-4:]]) < np.mean([loss for _, loss in curve[:4]])
    assert set(results) == {"validation", "test"}
    summary = json.loads((folder / "run" / "metrics.json").read_text())
    assert summary["metrics"]["test"]["loss"] == pytest.approx(results["test"]["loss"])
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    return results["test"]["loss"], rows


@pytest.mark.slow
def test_the_saved_model_has_the_reported_loss(folder, base):
    """Computes the loss from the logits of all rows in one batch."""
    reported, rows = learn(folder, base, "sequence-classification")
    model = Phi3ForSequenceClassification.from_pretrained(folder / "run")
    tokenizer = Phi3Tokenizer.from_pretrained(folder / "run")
    texts = [tokenizer.encode(row["text"]) for row in rows]
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    logits = np.asarray(outputs(model, input_ids=ids, attention_mask=ids != 0).logits, np.float64)
    labels = [model.config.label2id[row["label"]] for row in rows]
    chosen = logits[np.arange(len(rows)), labels]
    np.testing.assert_allclose(np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen), reported, rtol=1e-5)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("sequence-classification", marks=pytest.mark.live),
        *(slow(each) for each in list(REFERENCES)[1:]),
    ],
)
def test_transformers_loads_the_saved_model_with_the_reported_loss(folder, base, task):
    import torch
    import transformers

    reported, rows = learn(folder, base, task)
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
    np.testing.assert_allclose(total / count, reported, rtol=1e-5)


def test_steps_take_several_batches_where_rows_divide(folder, base):
    """Each has a row for every device, and they are a multiple of the micro-batches."""

    def batches(mesh=None, **changes):
        recipe = make_recipe(settings_of(folder, base, **{"max_buckets": 3} | changes), mesh, None)
        assert recipe.plan.rows * recipe.plan.step_batches == recipe.settings.train_batch_size
        return recipe.plan.step_batches

    assert batches() == 4
    assert batches(max_buckets=1) == 1
    assert batches(train_batch_size=4) == 2
    assert batches(train_batch_size=9) == 3
    assert batches(train_batch_size=7) == 1
    assert batches(train_batch_size=12, gradient_accumulation_steps=3) == 3
    assert batches(gradient_accumulation_steps=8) == 8
    mesh = make_mesh("data=4", jax.devices()[:4])
    assert batches(mesh) == 2
    assert batches(mesh, gradient_accumulation_steps=2) == 2
    assert batches(mesh, train_batch_size=16) == 4
    assert batches(mesh, train_batch_size=4) == 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"trained": "lora", "lora_dropout": 0.3}], ids=["full", "lora"])
def test_an_interrupted_run_saves_and_resumes(folder, base, monkeypatch, changes):
    """With dropout, micro-batches and widths, the losses are the same to the last bit."""
    options = {"task": "token-classification", "max_buckets": 2, "gradient_accumulation_steps": 2} | changes
    write_rows(folder / "train.jsonl", task="token-classification")
    run(folder, base, **options)
    expected, weights = losses(folder), (folder / "run" / "model.safetensors").read_bytes()
    options |= {"output_dir": folder / "again" / "run"}
    for step in (1, 4):
        with monkeypatch.context() as patch:
            interrupted_after(patch, step)
            with pytest.raises(InterruptedRunError, match=f"interrupted after step {step}, which is saved"):
                run(folder, base, **options)
    assert len(losses(folder / "again")) == 4
    run(folder, base, **options)
    assert losses(folder / "again") == expected
    assert (folder / "again" / "run" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_removes_temporary_files_of_killed_processes(folder, base, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        with pytest.raises(InterruptedRunError):
            run(folder, base, max_steps=2)
    with replacing(folder / "run" / "curves.png") as work:
        work.touch()
        os.link(work, work.with_name(work.name.replace(str(os.getpid()), "1")))  # as if killed
    (folder / "run" / "curves.png").unlink()
    (folder / "run" / ".run.abcdefgh.phi3-jax-replaced").mkdir()
    (folder / "run" / ".mine").touch()
    assert [path.name for path in (folder / "run").glob(".curves.png.*")]
    run(folder, base, max_steps=2)
    assert [path.name for path in (folder / "run").glob(".*")] == [".mine"]


def test_a_finished_run_changes_nothing(folder, base, caplog):
    results = run(folder, base, max_steps=2)
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record.keys() == {"settings", "data", "steps", "step_ranges", "base", "base_files", "finished"}
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").iterdir()}
    with caplog.at_level(logging.WARNING):
        assert run(folder, base, max_steps=2) == results
    assert "is finished; nothing is left to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").iterdir()} == before


def test_refuses_a_bucket_that_is_mounted_as_a_folder(folder, base, monkeypatch):
    table = folder / "mounts"
    table.write_text(f"my-bucket {folder} fuse.gcsfuse rw 0 0\n")
    monkeypatch.setattr(bucket_mounts, "MOUNTS", table)
    where = {"mesh": None, "topology": None, "distributed": False, "cache_dir": None}
    for start in (run, lambda *given: dry_run(settings_of(*given), **where)):
        with pytest.raises(UserError, match=r"run is in a bucket that gcsfuse mounts at .* give its URL"):
            start(folder, base)
    assert not (folder / "run").exists()


def test_removes_the_checkpoints_of_a_finished_run_on_request(folder, base):
    first = run(folder, base, max_steps=1, keep_checkpoints=False)
    assert "checkpoints" not in files(folder)
    assert run(folder, base, max_steps=1) == first


def test_an_unfinished_run_is_no_model_yet(folder, base, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        with pytest.raises(InterruptedRunError):
            run(folder, base, max_steps=2)
    with pytest.raises(CheckpointError, match="run is an unfinished run of finetune, which has no model yet"):
        Classifier.from_pretrained(folder / "run")


def test_trains_on_several_files_with_steps_of_warm_up(folder, base):
    write_rows(folder / "more.jsonl", 10, start=100)
    recipe = make_recipe(
        settings_of(
            folder,
            base,
            train_file=[str(folder / "train.jsonl"), str(folder / "more.jsonl")],
            warmup_steps=2,
            lr_scheduler_type="constant",
        ),
        None,
        None,
    )
    assert len(recipe.data.train) + len(recipe.data.validation) == 58
    assert [float(recipe.schedule(step)) for step in range(4)] == pytest.approx([0, 1.5e-3, 3e-3, 3e-3])
    with pytest.raises(OSError, match=r"no data at .*none\.jsonl"):
        make_recipe(
            settings_of(folder, base, train_file=[str(folder / "train.jsonl"), "none.jsonl"]), None, None
        )


def test_rejects_a_directory_with_another_run(folder, base):
    run(folder, base, max_steps=2)
    with pytest.raises(ValueError, match=r"resumed: learning_rate: 0\.003 -> 0\.1; seed: 0 -> 1\. "):
        run(folder, base, max_steps=2, learning_rate=0.1, seed=1)
    write_rows(folder / "train.jsonl", 40)
    with pytest.raises(ValueError, match="the data are not the same"):
        run(folder, base, max_steps=2)
    run(folder, base, max_steps=2, overwrite_output_dir=True)
    for name in ("model.safetensors", "tokenizer_config.json"):
        content = (base / name).read_bytes()
        (base / name).write_bytes(content[:-1] + (b"\0" if name == "model.safetensors" else b" }"))
        with pytest.raises(ValueError, match=rf"resumed: base_files\.{name}: '"):
            run(folder, base, max_steps=2)
        (base / name).write_bytes(content)
    run(folder, base, max_steps=2)
    assert len(losses(folder)) == 2
    (folder / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is broken"):
        run(folder, base, max_steps=2)


def test_one_run_at_a_time(folder, base):
    run(folder, base, max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").iterdir()}
    with (
        FileLock(folder / "run" / ".run.json.lock"),
        pytest.raises(ValueError, match=r"another process is writing .*run"),
    ):
        run(folder, base, max_steps=1, overwrite_output_dir=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_does_not_overwrite_a_model(folder, base):
    with pytest.raises(ValueError, match="is the base model itself; choose another --output-dir"):
        run(folder, base, output_dir=base, overwrite_output_dir=True)
    other = folder / "other"
    shutil.copytree(base, other)
    with pytest.raises(
        ValueError, match=r"holds config\.json and model\.safetensors .*, which no run of finetune"
    ):
        run(folder, base, output_dir=other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["checkpoints/mine.txt", "adapter/mine.txt", "log.jsonl", "tensorboard/mine.txt"]
)
def test_removes_nothing_that_no_run_wrote(folder, base, name):
    mine = folder / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    other = folder / "run" / ".notes.partial"
    other.write_text("mine")
    with pytest.raises(
        ValueError, match=f"run holds {name.partition('/')[0]}, which no run of finetune wrote"
    ):
        run(folder, base, max_steps=1)
    assert (mine.read_text(), other.read_text()) == ("mine", "mine")
    run(folder, base, max_steps=1, overwrite_output_dir=True)
    assert other.read_text() == "mine"


def test_losses_that_are_not_finite_stop_the_run(folder, base):
    """The message names step, learning rate and rows; the checkpoint before it stays."""
    with pytest.raises(NotFiniteError) as caught:
        run(folder, base, learning_rate=1e30, max_grad_norm=None, warmup_ratio=0.0, save_steps=1)
    text = str(caught.value)
    assert "step 2 (epoch 1) has the loss" in text
    assert "at learning rate 9.33e+29" in text
    assert "train.jsonl, line " in text
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["1"]


def test_logs_how_long_the_device_waits_for_batches(folder, base, monkeypatch):
    make = Loader.__next__

    def make_slowly(self):
        time.sleep(0.1)
        return make(self)

    monkeypatch.setattr(Loader, "__next__", make_slowly)
    run(folder, base, max_steps=4, eval_steps=4)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    shares = {record["step"]: record.get("input_wait") for record in log if record["kind"] == "train"}
    assert shares[1] is None
    assert all(0 < shares[step] <= 1 for step in (2, 3, 4))  # little, if the step is compiled
    report = json.loads((folder / "run" / "metrics.json").read_text())
    assert report["input_wait"] == pytest.approx(np.mean([shares[step] for step in (2, 3, 4)]))


def test_keeps_the_best_parameters(folder, base):
    """The rate is so high that an early evaluation is the best."""
    wild = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.5, "eval_steps": 1}
    results = run(folder, base, metric_for_best_model="loss", max_steps=8, **wild)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["loss"] for record in log if record["kind"] == "validation"}
    best = min(scores, key=scores.get)
    assert best < 8
    assert results["validation"]["loss"] == scores[best]
    assert json.loads((folder / "run" / "metrics.json").read_text())["best_step"] == best


@pytest.mark.slow
def test_exports_the_first_of_equally_good_models(folder, base):
    """Small validation data tie often; the saved model, scored again, is the best of metrics.json."""
    rows = write_rows(folder / "valid.jsonl", 4, start=50)
    wild = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "eval_steps": 1}
    results = run(folder, base, max_steps=10, validation_file=str(rows), **wild)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    validations = [record for record in log if record["kind"] == "validation"]
    best = max(record["accuracy"] for record in validations)
    equal = [record for record in validations if record["accuracy"] == best]
    assert len(equal) > 1
    assert len({record["loss"] for record in equal}) == len(equal)
    report = json.loads((folder / "run" / "metrics.json").read_text())
    assert report["best_step"] == equal[0]["step"]
    assert results["validation"]["loss"] == equal[0]["loss"]
    model = Classifier.from_pretrained(folder / "run", dtype="float32")
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    scores = model.predict([row["text"] for row in given], all_scores=True)
    again = [-math.log(score[f"score_{row['label']}"]) for score, row in zip(scores, given, strict=True)]
    assert np.mean(again) == pytest.approx(report["metrics"]["validation"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_stops_when_patience_is_over(folder, base):
    wild = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "eval_steps": 1}
    run(folder, base, metric_for_best_model="loss", max_steps=40, early_stopping_patience=2, **wild)
    steps = [step for step, _ in losses(folder)]
    best = json.loads((folder / "run" / "metrics.json").read_text())["best_step"]
    assert steps[-1] == best + 2 < 40


def changed_weights(folder, base):
    """Returns the names of the base model's weights that a run changed."""
    before, after = (load_file(each / "model.safetensors") for each in (base, folder / "run"))
    shared = before.keys() & after.keys()
    assert shared == before.keys() - {"lm_head.weight"}
    return {name for name in shared if not np.array_equal(before[name], after[name])}


ADAPTERS = {"trained": "lora", "lora_rank": 2, "lora_targets": ["qkv_proj"], "learning_rate": 0.02}


def test_trains_only_adapters_and_saves_them_beside_the_merged_model(folder, base):
    run(folder, base, **ADAPTERS)
    expected = {f"model.layers.{layer}.self_attn.qkv_proj.weight" for layer in range(2)}
    assert changed_weights(folder, base) == expected
    merged = Phi3ForSequenceClassification.from_pretrained(folder / "run")
    plain = Phi3ForSequenceClassification.from_pretrained(base, config=merged.config)
    adapted = load_adapters(plain, folder / "run" / "adapter")
    ids = np.arange(10, 18)[None]
    logits, merged_logits = (outputs(model, input_ids=ids).logits for model in (adapted, merged))
    assert distance(logits, merged_logits) <= 1e-5


def test_adapters_have_the_scale_of_the_settings(folder, base):
    for rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        settings = settings_of(folder, base, trained="lora", lora_rank=4, lora_alpha=8, use_rslora=rslora)
        recipe = make_recipe(settings, None, None)
        model = with_adapters(Phi3ForSequenceClassification.from_pretrained(base), recipe)
        assert model.model.layers[0].self_attn.qkv_proj.adapter.scaling == scale


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Returns the folder of a run that trained adapters and a head."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "train.jsonl")
    run(folder, base, **ADAPTERS, use_dora=True, lora_dropout=0.1, max_length=64, labels=["b", "a"])
    return folder / "run"


@pytest.mark.slow
def test_classifies_with_the_adapter_of_a_run_as_with_its_merged_model(trained):
    merged, adapted = (
        Classifier.from_pretrained(**source, dtype="float32")
        for source in ({"name_or_path": trained}, {"adapter": trained / "adapter"})
    )
    texts = ["lamp door", "song rain clock", "mail"]
    assert adapted.predict(texts, all_scores=True) == merged.predict(texts, all_scores=True)
    assert adapted.head == merged.head
    assert adapted.head.labels == ("b", "a")
    assert adapted.task == merged.task
    assert adapted.task.max_length == 64


@pytest.mark.slow
def test_classify_is_not_resumed_with_another_adapter(folder, trained):
    """A bad row ends the command after its first 32 rows."""
    copy, rows = folder / "adapter", folder / "rows.jsonl"
    shutil.copytree(trained / "adapter", copy)
    rows.write_text('{"text": "lamp"}\n' * 32 + '{"text": 1}\n')
    command = partial(
        classify_file, None, rows, folder / "out.csv", adapter=str(copy), batch_size=1, show=False
    )
    with pytest.raises(BadRowError, match="line 33"):
        command(dtype="float32")
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"cannot be resumed: adapter_files\.adapter_model\.safetensors"):
        command(dtype="float32")
    (copy / "out.csv").touch()
    (copy / "out.csv").touch()
    with pytest.raises(ValueError, match=r"the output .* is in the adapter; choose another"):
        classify_file(None, rows, copy / "out.csv", adapter=str(copy))


def test_starts_from_an_adapter_and_its_head(folder, base, trained):
    """With the labels of the adapter in another order the head's rows move; with others the head is new."""
    ids = np.arange(10, 18)[None]
    expected = outputs(Phi3ForSequenceClassification.from_pretrained(trained), input_ids=ids).logits
    for labels, rows in ((None, [0, 1]), (["a", "b"], [1, 0]), (["a", "b", "c"], None)):
        settings = settings_of(folder, base, adapter=str(trained / "adapter"), labels=labels)
        recipe = make_recipe(settings, None, None)
        assert (recipe.settings.trained, recipe.settings.lora_rank) == ("lora", 2)
        assert recipe.settings.use_dora
        assert recipe.settings.lora_targets == ["qkv_proj"]
        model = with_adapters(new_model(recipe, None), recipe)
        logits = outputs(model, input_ids=ids).logits
        if rows is None:
            assert logits.shape == (1, 3)
        else:
            assert distance(logits, expected[:, rows]) <= 1e-5


def test_starts_from_every_bit_of_the_adapter_and_its_head(folder, base, trained):
    settings = settings_of(
        folder, base, adapter=str(trained / "adapter"), labels=["a", "b"], dtype="bfloat16"
    )
    recipe = make_recipe(settings, None, None)
    model = with_adapters(new_model(recipe, None), recipe)
    stored = load_file(trained / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert model.dtype == "bfloat16"
    np.testing.assert_array_equal(model.score.weight[...], stored[::-1])


@pytest.mark.slow
def test_trains_an_adapter_further(folder, base, trained, monkeypatch):
    given = {"model": None, "adapter": str(trained / "adapter"), "labels": ["b", "a"]}
    run(folder, base, **given, max_steps=2)
    first, second = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (trained, folder / "run")
    )
    assert first.keys() == second.keys()
    assert all(0 < distance(second[name], tensor) < 0.5 for name, tensor in first.items())
    written = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_dropout"]) == (str(base), 2, 0.1)
    record = json.loads((folder / "run" / "run.json").read_text())
    assert (record["settings"]["lora_rank"], record["adapter"]) == (2, given["adapter"])

    copy = folder / "copy"
    shutil.copytree(trained / "adapter", copy)
    given["adapter"] = str(copy)
    with pytest.raises(ValueError, match="cannot be resumed: adapter: "):
        run(folder, base, **given, max_steps=2)
    shutil.rmtree(folder / "run")
    monkeypatch.setattr(module, "FinetuneRun", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        run(folder, base, **given, max_steps=2)
    tensors = {name: tensor * 2 for name, tensor in first.items()}
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"cannot be resumed: adapter_files\.adapter_model\.safetensors: '\w+' -> '\w+'\. ",
    ):
        run(folder, base, **given, max_steps=2)


def test_trains_the_modules_that_the_adapter_has_as_a_whole(folder, base):
    model = add_lora(Phi3ForCausalLM.from_pretrained(base), 2, targets=["o_proj"])
    save_adapters(model, folder / "adapter", base_model=str(base), modules_to_save=["embed_tokens", "norm"])
    settings = settings_of(folder, base, adapter=str(folder / "adapter"), task="causal-lm")
    recipe = make_recipe(settings, None, None)
    trainer = make_trainer(recipe, with_adapters(new_model(recipe, None), recipe), None)
    trained = {path[-2] for path, _ in nnx.to_flat_state(trainer.state_shapes.trained)}
    norms = {"norm", "input_layernorm", "post_attention_layernorm"}  # whose names end with norm
    assert trained == {"embed_tokens", "adapter"} | norms


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 3}, "lora_rank=3, and .*adapter_config.json has 2, .*; leave lora_rank out"),
        ({"lora_alpha": 3.5}, "lora_alpha=3.5, and .*adapter_config.json has 4.0"),
        ({"use_dora": False}, "use_dora=False, and .*adapter_config.json has True"),
        ({"lora_dropout": 0.5}, "lora_dropout=0.5, and .*adapter_config.json has 0.1"),
        ({"use_rslora": True}, "use_rslora=True, and .*adapter_config.json has False"),
        ({"lora_targets": ["o_proj"]}, r"lora_targets=\['o_proj'\], and .* has \['qkv_proj'\]"),
        ({"trained": "full"}, "adapter needs trained=lora, and trained=full"),
        ({"task": "token-classification"}, "task_type='SEQ_CLS' belongs to Phi3ForSequenceClassification"),
    ],
)
def test_rejects_settings_that_contradict_the_adapter(folder, base, trained, changes, words):
    with pytest.raises(ValueError, match=words):
        run(folder, base, adapter=str(trained / "adapter"), **changes)


@pytest.mark.parametrize("output", ["run", "run/adapter"])
def test_does_not_write_over_the_adapter(folder, base, trained, output):
    (folder / "link").symlink_to(trained)
    before = {path.name: path.read_bytes() for path in (trained / "adapter").iterdir()}
    for place in (trained.parent / output, folder / output.replace("run", "link")):
        with pytest.raises(ValueError, match=f"{place} would write over --adapter .*; choose another"):
            run(
                folder,
                base,
                adapter=str(trained / "adapter"),
                output_dir=place,
                overwrite_output_dir=True,
            )
    assert {path.name: path.read_bytes() for path in (trained / "adapter").iterdir()} == before


# PEFT uses a deprecated name of transformers.
@pytest.mark.live
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_adapters(folder, base):
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
def test_trains_only_the_head(folder, base):
    run(folder, base, trained="head", max_steps=3)
    assert changed_weights(folder, base) == set()


@pytest.mark.slow
def test_packed_rows_have_the_same_loss(folder, base):
    """The first step's batch has all examples, packed or not."""
    write_rows(folder / "train.jsonl", task="causal-lm", count=10)
    write_rows(folder / "validation.jsonl", task="causal-lm", count=4)
    options = {"task": "causal-lm", "messages_column": "messages", "max_steps": 1, "max_length": 128}
    options |= {"validation_file": str(folder / "validation.jsonl"), "dropout": False}
    run(folder, base, train_batch_size=10, **options)
    (folder / "packed").mkdir()
    run(folder, base, packing=True, output_dir=folder / "packed" / "run", train_batch_size=8, **options)
    np.testing.assert_allclose(losses(folder / "packed")[0][1], losses(folder)[0][1], rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_a_mesh_has_the_same_losses(folder, tmp_path_factory):
    base = write_base(
        tmp_path_factory.mktemp("mesh") / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=8
    )
    options = {"max_steps": 3, "train_batch_size": 16, "max_buckets": 2}
    run(folder, base, **options)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    finetune(settings_of(folder, base, **options, output_dir=folder / "mesh" / "run"), mesh=mesh, show=False)
    ours, expected = (np.asarray([loss for _, loss in losses(each)]) for each in (folder / "mesh", folder))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric_for_best_model": "f2"}, "f2"),
        ({"train_file": "no.jsonl"}, r"no data at no\.jsonl"),
        ({"text_column": "body"}, "there is no column 'body'"),
        ({"class_weights": {"a": 1.0}}, "class_weights must name each label once; 'b'"),
        (
            {"eval_batch_size": 2**17},
            "eval_batch_size=131072 is more than a batch can have; use 65536 or fewer",
        ),
        (
            {"max_steps": None, "num_train_epochs": 1e38},
            r"num_train_epochs=1e\+38 are 6e\+38 steps, more than",
        ),
    ],
)
def test_rejects_settings_that_do_not_fit_the_data(folder, base, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        run(folder, base, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("score", "at"), [("loss", 2), ("accuracy", 3)])
def test_an_evaluation_that_is_not_finite_stops_the_run(folder, base, monkeypatch, score, at):
    """No model is written, the checkpoint before it stays, and the same command tries again."""
    write_rows(folder / "test.jsonl", 4)
    options = {"test_file": str(folder / "test.jsonl"), "max_steps": 2, "eval_steps": 1}
    call, calls = module.Evaluator.__call__, []

    def broken(self, state, stops):
        calls.append(None)
        metrics, predictions = call(self, state, stops)
        return (metrics | {score: np.nan} if len(calls) >= at else metrics), predictions

    with monkeypatch.context() as patch:
        patch.setattr(module.Evaluator, "__call__", broken)
        with pytest.raises(
            NotFiniteError, match=rf"the evaluation of the validation data .* has {score} nan"
        ):
            run(folder, base, **options)
    assert not (folder / "run" / "model.safetensors").exists()
    kept = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    assert kept == ({"1"} if at == 2 else {"1", "2"})
    if at == 2:
        assert set(run(folder, base, **options)) == {"validation", "test"}


def test_names_or_counts_bad_rows(folder, base, caplog):
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = '{"text": "rain", "label'
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(BadRowError, match=r"train\.jsonl, line 5: "):
        run(folder, base)
    with caplog.at_level(logging.WARNING):
        run(folder, base, skip_bad_rows=True, max_steps=1)
    assert "1 bad row was skipped; the first: " in caplog.text
    assert json.loads((folder / "run" / "metrics.json").read_text())["data"]["bad rows skipped"] == 1


@pytest.mark.slow
def test_balances_class_weights_by_their_counts(folder, base):
    run(folder, base, class_weights="balanced", label_smoothing=0.1, max_steps=1)
    assert len(losses(folder)) == 1


@pytest.mark.slow
def test_warns_of_a_damaged_best_checkpoint(folder, base, monkeypatch, caplog):
    def restore(self, step, state):
        raise CheckpointError(f"{step} cannot be read: it is damaged")

    wild = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.5, "eval_steps": 1}
    monkeypatch.setattr(module.Checkpoints, "restore", restore)
    with caplog.at_level(logging.WARNING):
        run(folder, base, metric_for_best_model="loss", max_steps=8, **wild)
    assert "the last parameters are kept instead of the best" in caplog.text


def test_rejects_batches_that_the_mesh_does_not_divide(folder, base):
    with pytest.raises(ValueError, match=r"train_batch_size=6 does not divide over 8 .*; use 8, for example"):
        finetune(
            settings_of(folder, base, train_batch_size=6), mesh=make_mesh("data=8", jax.devices()), show=False
        )
