"""The option --adapter: commands answer as with the merged model, and refuse adapters that do not fit."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import small_config
from small_checkpoint import PROMPT, write_checkpoint

from phi3_jax import Phi3ForCausalLM, Phi3ForSequenceClassification
from phi3_jax.checkpoint import open_checkpoint, quantize_checkpoint
from phi3_jax.errors import UserError
from phi3_jax.lora import adapted as module
from phi3_jax.lora import add_lora, load_adapters, merge_lora, save_adapters
from phi3_jax.lora.adapters import projections
from phi3_jax.lora.peft_config import AdapterConfig
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.quantizing import has_quantized_weights
from phi3_jax.sources.hub import ADAPTER_FILES

TEXT = "What is the capital of France? "


def write_adapter(model: Phi3PreTrainedModel, folder: Path, base: Path, seed: int = 0) -> Path:
    """Writes random adapters that change every answer."""
    adapted, rng = add_lora(model, 2), np.random.default_rng(seed)
    for _, linear in projections(adapted):
        for part in (linear.adapter.a, linear.adapter.b):
            part.set_value(jnp.asarray(rng.normal(0, 0.3, part.shape), jnp.float32))
    save_adapters(adapted, folder, base_model=str(base))
    return folder


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return write_adapter(Phi3ForCausalLM.from_pretrained(model_folder), folder, model_folder)


@pytest.fixture(scope="module")
def merged_folder(model_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `merge_lora` made of the model and its adapter."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    shutil.copytree(model_folder, folder)
    model = Phi3ForCausalLM.from_pretrained(model_folder)
    merge_lora(load_adapters(model, adapter)).save_pretrained(folder)
    return folder


def changed(folder: Path, copy: Path, **fields: Any) -> Path:
    """Copies an adapter and changes its config."""
    shutil.copytree(folder, copy)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return copy


def test_generate_and_chat_answer_as_the_merged_model(
    run: Any, model_folder: Path, merged_folder: Path, adapter: Path
) -> None:
    for command in (("generate", PROMPT), ("chat",)):
        words = (*command, "--max-new-tokens", 7, "--dtype", "float32")
        given: tuple[tuple[object, ...], ...] = (
            ("--model", model_folder),
            ("--model", merged_folder),
            ("--adapter", adapter),
            ("--model", model_folder, "--adapter", adapter),
        )
        base, *others = (run(*words, *options, stdin=f"{PROMPT}\n") for options in given)
        assert [other.code for other in others] == [0, 0, 0]
        merged, alone, both = (other.out for other in others)
        assert merged == alone == both != base.out


@pytest.mark.slow
def test_batch_and_evaluate_answer_as_the_merged_model_and_record_the_adapter(
    run: Any, model_folder: Path, merged_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": PROMPT}) + "\n")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    results: dict[str, list[Any]] = {"batch": [], "evaluate": []}
    for name, options in {"merged": ("--model", merged_folder), "adapted": ("--adapter", adapter)}.items():
        tail = (*options, "--dtype", "float32", "--output", tmp_path / f"{name}.jsonl")
        sizes = ("--max-new-tokens", 4, "--max-length", 128, "--slots", 1)
        assert run("batch", "--input", tmp_path / "in.jsonl", *sizes, *tail).code == 0
        results["batch"].append((tmp_path / f"{name}.jsonl").read_text())
        evaluated = run("evaluate", tmp_path / "text.txt", *tail[:-2], "--length", 32)
        results["evaluate"].append(json.loads(evaluated.out))
    merged, adapted = results["evaluate"]
    assert merged["perplexity"] == adapted["perplexity"]
    assert results["batch"][0] == results["batch"][1]
    assert adapted["model"] == str(model_folder)
    assert adapted["adapter"] == str(adapter)
    assert adapted["adapter_files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert "adapter" not in merged


def test_batch_is_not_resumed_with_another_adapter(
    run: Any, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n')  # an error as answer needs no model
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    words = ("batch", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--adapter", own)
    assert run(*words).code == 3
    assert run(*words).code == 3
    write_adapter(Phi3ForCausalLM.from_pretrained(model_folder), own, model_folder, seed=1)
    result = run(*words)
    assert result.code == 1
    assert "started with other options and cannot be resumed: adapter_files.adapter_model.saf" in result.err
    result = run(*words[:-2], "--model", model_folder)
    assert "adapter: " in result.err


def test_commands_keep_the_adapter(run: Any, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n')
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    for words in (
        ("batch", "--input", tmp_path / "in.jsonl", "--overwrite", "--output", weights),
        ("batch", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--stats", config),
        ("evaluate", tmp_path / "in.jsonl", "--output", weights),
    ):
        result = run(*words, "--adapter", adapter)
        assert result.code == 1
        assert f"{words[-2]} {words[-1]} is in --adapter; choose another" in result.err
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.fixture
def reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(module, "load_model", refuse)


@pytest.mark.usefixtures("reads_no_weights")
def test_rejects_adapters_before_the_model_is_loaded(
    run: Any, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    def error(*words: object) -> str:
        result = run("generate", PROMPT, *words)
        assert (result.code, result.out) == (1, "")
        return result.err

    config = "adapter_config.json"
    unnamed = changed(adapter, tmp_path / "unnamed", base_model_name_or_path=None)
    assert (
        f"{unnamed / config}: base_model_name_or_path=None names no model; give the base model (--model)"
        in error("--adapter", unnamed)
    )
    gone = changed(adapter, tmp_path / "gone", base_model_name_or_path="./gone")
    message = error("--adapter", gone)
    assert f"{gone / config} has base_model_name_or_path='./gone': './gone' does not exist; " in message
    assert message.endswith("; or give another base model (--model)\n")
    assert "the adapter './nowhere' does not exist; give a directory that PEFT" in error(
        "--adapter", "./nowhere"
    )
    assert f"{tmp_path / config} does not exist; expected a directory that PEFT" in error(
        "--adapter", tmp_path
    )
    assert f"{adapter} holds adapters and no model; give it as the adapter (--adapter)" in error(
        "--model", adapter
    )
    wide = tmp_path / "wide"
    wide.mkdir()
    write_checkpoint(wide, hidden_size=96)
    assert "lora_A.weight has shape [2, 48], expected [2, 96]" in error("--adapter", adapter, "--model", wide)
    shutil.copytree(adapter, tmp_path / "described")
    shutil.copy(model_folder / "config.json", tmp_path / "described")
    assert "hidden_size=48, and the base model " in error(
        "--adapter", tmp_path / "described", "--model", wide
    )
    classifier = Phi3ForSequenceClassification(small_config(num_labels=3))
    other = write_adapter(classifier, tmp_path / "classifier", model_folder)
    assert "task_type='SEQ_CLS' belongs to Phi3ForSequenceClassification" in error("--adapter", other)
    described = (*("--input", model_folder / "config.json"), "--output", tmp_path / "out.csv")
    result = run("classify", *described, "--adapter", adapter)
    assert (
        f"{adapter} is not a classifier: its config.json has architectures=['Phi3ForCausalLM']" in result.err
    )
    assert "no model is given; name a classifier (--model) or the adapter" in run("classify", *described).err


def test_fetches_an_adapter_and_the_revision_of_its_base(
    model_folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = changed(adapter, tmp_path / "named", base_model_name_or_path="owner/base", revision="v2")
    fetched = []

    def fetch(name: str, files: Any, *, revision: str | None, **_: Any) -> Path:
        fetched.append((name, revision, "adapter_config.json" in files))
        assert name == "owner/base" or files == ADAPTER_FILES
        return {"owner/adapter": named, "owner/base": model_folder}[name]

    monkeypatch.setattr("phi3_jax.sources.hub._fetch", fetch)
    paths = module.find_model(None, "owner/adapter", lambda: pytest.fail("the default model was taken"))
    assert paths == (model_folder, named)
    assert fetched == [("owner/adapter", None, True), ("owner/base", "v2", False)]


def test_the_adapter_decides_class_and_labels(model_folder: Path, tmp_path: Path) -> None:
    """PEFT's files have a head and no names; those of the base model count if there are as many."""
    classifier = Phi3ForSequenceClassification(small_config(num_labels=3))
    adapter = write_adapter(classifier, tmp_path / "adapter", model_folder)
    for names, expected in (
        (None, ("LABEL_0", "LABEL_1", "LABEL_2")),
        (("x", "y"), ("LABEL_0", "LABEL_1", "LABEL_2")),
        (("x", "y", "z"), ("x", "y", "z")),
    ):
        base = tmp_path / f"base {names}"
        shutil.copytree(model_folder, base)
        if names is not None:
            fields = json.loads((base / "config.json").read_text()) | {"id2label": dict(enumerate(names))}
            (base / "config.json").write_text(json.dumps(fields))
        source, config = module.open_model(module.ModelPaths(base, adapter))
        assert tuple(config.id2label.values()) == expected
        assert config.extra["architectures"] == ["Phi3ForSequenceClassification"]
        np.testing.assert_array_equal(source.read("score.weight"), classifier.score.weight[...])


def test_an_adapter_on_quantized_weights(model_folder: Path, tmp_path: Path) -> None:
    """The base model's weights stay integers, and the head comes from the adapter."""
    base, name = tmp_path / "base", "model.layers.1.mlp.down_proj.weight"
    quantize_checkpoint(model_folder, base)
    classifier = Phi3ForSequenceClassification(small_config(num_labels=3))
    adapter = write_adapter(classifier, tmp_path / "adapter", base)
    source, _ = module.open_model(module.ModelPaths(base, adapter))
    own = open_checkpoint(base).source
    assert source.form("score.weight") is None
    assert source.form(name) == own.form(name) is not None
    np.testing.assert_array_equal(source.read_quantized(name).values, own.read_quantized(name).values)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_dora_makes_floats_of_quantized_weights(
    model_folder: Path, tmp_path: Path, quantization: str | None
) -> None:
    """Unless a quantization is asked for: then an error says that it needs floats."""
    base = tmp_path / "base"
    quantize_checkpoint(model_folder, base)
    floats = Phi3ForCausalLM.from_pretrained(base, quantization="none")
    adapted = add_lora(floats, rank=2, dora=True)
    save_adapters(adapted, tmp_path / "adapter", base_model=str(base))
    checkpoint = module.open_model(module.ModelPaths(base, tmp_path / "adapter"))
    load = partial(module.load_merged, Phi3ForCausalLM, checkpoint, tmp_path / "adapter", dtype="float32")
    if quantization is None:
        assert not has_quantized_weights(load())
    else:
        with pytest.raises(UserError, match="DoRA needs its floats"):
            load(quantization=quantization)


def test_keeps_the_modules_that_the_adapter_has_as_a_whole() -> None:
    """PEFT names two heads for a classifier, of which the model has one."""
    model = Phi3ForSequenceClassification(small_config(num_labels=3))
    for saved, kept in (
        (["classifier", "score"], ["score"]),
        (["embed_tokens"], ["embed_tokens", "score"]),
        (None, ["score"]),
    ):
        config = AdapterConfig({"modules_to_save": saved}, Path("adapter_config.json"))
        assert module.saved_modules(config, model) == kept
    assert module.saved_modules(config, Phi3ForCausalLM(small_config())) == []
