"""Checkpoints of transformers survive loading and saving: every bit, every name, every option."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from answers import stored
from reference import CLASSES, distance, longrope, pair, run, run_theirs, small_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from phi3_jax import (
    CheckpointError,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
    convert_checkpoint,
)
from phi3_jax.checkpoint.safetensors import parse_size
from phi3_jax.model.saving import ModelSource

IDS = np.random.default_rng(1).integers(4, 96, (2, 9))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a directory, read by the safetensors package."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


def save_theirs(kind: str, settings: dict[str, Any], folder: Path, dtype: str, max_shard_size: str) -> Any:
    """Saves a random model of transformers in `folder`."""
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = getattr(transformers, CLASSES[kind][0])(transformers.Phi3Config(**settings)).eval()
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs


@stored
def files_of_theirs(kind: str, settings: dict[str, Any], dtype: str, max_shard_size: str) -> dict[str, Any]:
    """Returns the files that transformers saves of a random model, with shapes in place of values."""
    answer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        save_theirs(kind, settings, Path(temporary), dtype, max_shard_size)
        for path in sorted(Path(temporary).iterdir()):
            if path.suffix == ".json":
                content = json.loads(path.read_text())
                content.pop("weight_map", None)  # follows from the files
                answer[path.name] = json.dumps(content)
            else:
                with safe_open(path, "np") as file:
                    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                answer[path.name] = json.dumps(shapes)
    return answer


def theirs_saved(
    kind: str, config: Phi3Config, folder: Path, dtype: str = "float32", max_shard_size: str = "5GB"
) -> dict[str, np.ndarray]:
    """Writes the files that transformers saves of such a model, with random values; returns its tensors."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    files = files_of_theirs(kind, config.to_dict(), dtype, max_shard_size)
    weight_map: dict[str, str] = {}
    for file, content in files.items():
        if file.endswith(".safetensors"):
            part = {
                name: rng.normal(0, 0.15, shape).astype(jnp.dtype(dtype))
                for name, shape in json.loads(content).items()
            }
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            found |= part
    for file, content in files.items():
        if file.endswith(".index.json"):
            (folder / file).write_text(json.dumps(json.loads(content) | {"weight_map": weight_map}))
        elif file.endswith(".json"):
            (folder / file).write_text(content)
    return found


def rewrite(folder: Path, change: Any) -> None:
    """Changes the tensors of a single-file checkpoint with `change(tensors)`."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def values(model: Any) -> dict[str, np.ndarray]:
    source = ModelSource(model)
    return {name: source.read(name) for name in source.names()}


SIZES = {True: "25KB", False: "5GB"}
"""The size of a shard, for several shards and for a single file."""
SHARDED = pytest.mark.parametrize(("theirs_sharded", "ours_sharded"), [(False, False), (True, True)])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
MODELS = pytest.mark.parametrize(
    ("kind", "tied"),
    [("causal", False), ("causal", True), ("sequence", False), ("token", True), ("base", False)],
)


def load_and_save(kind: str, dtype: str, folder: Path, theirs_sharded: bool, ours_sharded: bool) -> None:
    """Loads `theirs`, saves `ours` in `folder`, and checks every bit and the number of files."""
    model = CLASSES[kind][1].from_pretrained(folder / "theirs")
    assert model.dtype == jnp.dtype(dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {dtype}
    model.save_pretrained(folder / "ours", max_shard_size=SIZES[ours_sharded])
    assert (len(list((folder / "ours").glob("*.safetensors"))) > 3) == ours_sharded
    assert (len(list((folder / "theirs").glob("*.safetensors"))) > 3) == theirs_sharded
    assert_same_bits(tensors(folder / "ours"), tensors(folder / "theirs"))


@SHARDED
@DTYPES
@MODELS
def test_every_bit_survives(
    tmp_path: Path, kind: str, tied: bool, dtype: str, theirs_sharded: bool, ours_sharded: bool
) -> None:
    config = small_config(tie_word_embeddings=tied, num_labels=3)
    theirs = theirs_saved(kind, config, tmp_path / "theirs", dtype, SIZES[theirs_sharded])
    load_and_save(kind, dtype, tmp_path, theirs_sharded, ours_sharded)
    assert_same_bits(tensors(tmp_path / "ours"), theirs)


@pytest.mark.live
@SHARDED
@DTYPES
@MODELS
def test_every_bit_survives_in_transformers(
    tmp_path: Path, kind: str, tied: bool, dtype: str, theirs_sharded: bool, ours_sharded: bool
) -> None:
    import torch

    settings = small_config(tie_word_embeddings=tied, num_labels=3).to_dict()
    theirs = save_theirs(kind, settings, tmp_path / "theirs", dtype, SIZES[theirs_sharded])
    load_and_save(kind, dtype, tmp_path, theirs_sharded, ours_sharded)
    loaded = type(theirs).from_pretrained(tmp_path / "ours")
    assert loaded.dtype == getattr(torch, dtype)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.live
@pytest.mark.parametrize("kind", CLASSES)
def test_transformers_computes_the_same_from_a_saved_model(tmp_path: Path, kind: str) -> None:
    import torch

    config = small_config(**longrope(), num_labels=3, sliding_window=7)
    ours, reference = pair(kind, config, tmp_path / "theirs")
    theirs = reference.model
    ours.save_pretrained(tmp_path / "ours")
    loaded = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        expected, found = theirs(torch.tensor(IDS))[0], loaded(torch.tensor(IDS))[0]
    assert torch.equal(found, expected)
    out = run(ours, input_ids=IDS)
    assert distance(out.last_hidden_state if kind == "base" else out.logits, found) <= 1e-5
    own = {"_name_or_path", "_attn_implementation_internal", "_output_attentions"}
    ours_config, theirs_config = loaded.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in ours_config.items() if k not in own} == {
        k: v for k, v in theirs_config.items() if k not in own
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_config_json_has_class_and_dtype(tmp_path: Path, kind: str) -> None:
    theirs_saved(kind, small_config(), tmp_path / "theirs")
    theirs = config_json(tmp_path / "theirs")
    theirs["torch_dtype"] = theirs.pop("dtype")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(theirs | {"of_the_user": [1, None]}))
    CLASSES[kind][1].from_pretrained(tmp_path / "theirs", dtype="bfloat16").save_pretrained(tmp_path / "ours")
    saved = config_json(tmp_path / "ours")
    assert saved["architectures"] == [CLASSES[kind][0]]
    assert saved["dtype"] == "bfloat16"
    assert "torch_dtype" not in saved
    assert saved["of_the_user"] == [1, None]
    assert Phi3Config.from_pretrained(tmp_path / "ours").replace(extra={}) == small_config()


def test_saving_again_replaces_shards_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small = Phi3ForCausalLM(small_config(), rngs=1)
    Phi3ForCausalLM(small_config(), rngs=0).save_pretrained(folder, max_shard_size="40KB")
    others = {"tokenizer.json": b"{}", "model.md": b"card", "adapter_model.safetensors": b"other"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    (folder / "sub").mkdir()
    assert len(list(folder.glob("model-*.safetensors"))) > 3

    small.save_pretrained(folder)
    ours = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*others, *ours, "sub"}
    assert {name: (folder / name).read_bytes() for name in others} == others
    loaded = values(Phi3ForCausalLM.from_pretrained(folder))
    assert all(np.array_equal(loaded[name], value) for name, value in values(small).items())

    small.save_pretrained(folder, max_shard_size="100KB")  # from one file to shards
    assert not (folder / "model.safetensors").exists()
    numbers = {path.name[-13:-12] for path in folder.glob("model-*.safetensors")}
    assert len(numbers) == 1, "there are shards of two saves"
    Phi3ForCausalLM.from_pretrained(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_shards_have_the_size_and_the_index_fits_them(tmp_path: Path) -> None:
    model = Phi3ForCausalLM(small_config())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = 0
    for path in tmp_path.glob("*.safetensors"):
        content = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == content.keys()
        size = sum(tensor.nbytes for tensor in content.values())
        assert size <= 40_000 or len(content) == 1
        assert path.stat().st_size <= size + 8 + 200 * (len(content) + 1)
        total += size
    assert index["metadata"]["total_size"] == total == 4 * model.num_parameters()


def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").touch()
    Phi3Model(small_config()).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == (plain / "file").stat().st_mode


def test_parses_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500 mb": 5 * 10**8, "1.5KB": 1500, "2GiB": 2**31, 7: 7, "7": 7}
    assert {size: parse_size(size) for size in sizes} == sizes
    for wrong in ("", "GB", "-1", 0, "5 apples", "0.1", None):
        with pytest.raises(ValueError, match="is not a size; write a number of bytes, 500MB or 5GB"):
            parse_size(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_and_models_with_heads_load_each_others_checkpoints(
    tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tie_word_embeddings=tied)
    base = theirs_saved("base", config, tmp_path / "base")
    causal = theirs_saved("causal", config, tmp_path / "causal")
    with caplog.at_level(logging.WARNING):
        decoder = values(Phi3Model.from_pretrained(tmp_path / "causal"))
    assert not caplog.records
    assert decoder.keys() == base.keys()
    for name, value in decoder.items():
        assert np.array_equal(value, causal[f"model.{name}"]), name

    for cls in (Phi3ForSequenceClassification, Phi3ForTokenClassification):
        loaded = values(cls.from_pretrained(tmp_path / "base"))
        for name, tensor in base.items():
            assert np.array_equal(loaded[f"model.{name}"], tensor), name
    if tied:
        assert values(Phi3ForCausalLM.from_pretrained(tmp_path / "base")).keys() == {
            f"model.{name}" for name in decoder
        }
    else:
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
            Phi3ForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("cls", [Phi3ForSequenceClassification, Phi3ForTokenClassification])
def test_causal_checkpoint_loads_into_a_classifier(
    tmp_path: Path, cls: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = theirs_saved("causal", small_config(), tmp_path, "bfloat16")
    first = cls.from_pretrained(tmp_path, num_labels=5, rngs=3, use_cache=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    new = "score.bias and score.weight" if cls is Phi3ForTokenClassification else "score.weight"
    assert f"{tmp_path} has no {new} that fits: initialised, to be trained" in record.getMessage()
    assert first.config.num_labels == 5
    loaded = values(first)
    assert loaded["score.weight"].shape == (5, 48)
    assert loaded["score.weight"].dtype == ml_dtypes.bfloat16
    assert 0.05 < loaded["score.weight"].astype(np.float32).std() < 0.3  # initializer_range = 0.15
    assert not loaded.get("score.bias", np.zeros(1)).any()
    key = "model.layers.1.self_attn.qkv_proj.weight"
    assert np.array_equal(loaded[key].astype(np.float32), theirs[key].astype(np.float32))

    def score(rngs: Any) -> np.ndarray:
        return values(cls.from_pretrained(tmp_path, num_labels=5, rngs=rngs))["score.weight"]

    assert np.array_equal(score(3), loaded["score.weight"])
    assert not np.array_equal(score(4), loaded["score.weight"])


def test_reads_the_old_name_of_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = theirs_saved("token", small_config(num_labels=3), tmp_path)

    def rename(found: dict[str, np.ndarray]) -> None:
        for part in ("weight", "bias"):
            found[f"classifier.{part}"] = found.pop(f"score.{part}") + 1

    rewrite(tmp_path, rename)
    loaded = values(Phi3ForTokenClassification.from_pretrained(tmp_path))
    assert not caplog.records
    assert np.array_equal(loaded["score.weight"], theirs["score.weight"] + 1)
    assert np.array_equal(loaded["score.bias"], theirs["score.bias"] + 1)


def test_rejects_or_initialises_another_number_of_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = theirs_saved("token", small_config(num_labels=3), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Phi3ForTokenClassification.from_pretrained(tmp_path, num_labels=4)
    assert "score.weight has shape [3, 48], expected [4, 48] (ignore_mismatched_sizes=True" in str(
        caught.value
    )
    assert "score.bias has shape [3], expected [4]" in str(caught.value)
    model = Phi3ForTokenClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert "score.bias and score.weight" in caplog.text
    loaded = values(model)
    assert loaded["score.weight"].shape == (4, 48)
    assert np.array_equal(loaded["model.norm.weight"], theirs["model.norm.weight"])
    caplog.clear()
    same = Phi3ForTokenClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert np.array_equal(values(same)["score.weight"], theirs["score.weight"])
    assert not caplog.records


def test_never_ignores_mismatched_sizes_of_the_decoder(tmp_path: Path) -> None:
    theirs_saved("sequence", small_config(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"model\.embed_tokens\.weight has shape \[96, 48\], expected \[97"
    ):
        Phi3ForSequenceClassification.from_pretrained(tmp_path, vocab_size=97, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kind", ["causal", "base"])
def test_ignores_old_rope_buffers(tmp_path: Path, kind: str) -> None:
    theirs_saved(kind, small_config(), tmp_path)
    prefix = "" if kind == "base" else "model."
    before = values(CLASSES[kind][1].from_pretrained(tmp_path))
    rewrite(
        tmp_path,
        lambda found: found.update(
            {f"{prefix}layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(2)}
        ),
    )
    after = values(CLASSES[kind][1].from_pretrained(tmp_path))
    assert after.keys() == before.keys()


def test_loads_a_tied_checkpoint_with_a_stored_head(tmp_path: Path) -> None:
    _, theirs = pair("causal", small_config(tie_word_embeddings=True), tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda found: found.update({"lm_head.weight": embedding.copy()}))
    model = Phi3ForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head is None
    assert np.array_equal(values(model)["model.embed_tokens.weight"], embedding)
    assert distance(run(model, input_ids=IDS).logits, run_theirs(theirs, IDS, None).logits) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16, np.float16, "auto", None])
def test_casts_to_the_dtype(tmp_path: Path, dtype: Any) -> None:
    theirs = theirs_saved("causal", small_config(), tmp_path, "bfloat16")
    model = Phi3ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = jnp.dtype("bfloat16" if dtype in (None, "auto") else dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {expected}
    key = "model.layers.0.mlp.down_proj.weight"
    widened = theirs[key].astype(np.float32).astype(expected)
    assert np.array_equal(values(model)[key], widened)


def test_casts_mixed_and_double_dtypes_to_one(tmp_path: Path) -> None:
    theirs_saved("causal", small_config(), tmp_path)

    def mix(found: dict[str, np.ndarray]) -> None:
        found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"].astype(np.float64)
        found["model.norm.weight"] = found["model.norm.weight"].astype(np.float16)

    rewrite(tmp_path, mix)
    model = Phi3ForCausalLM.from_pretrained(tmp_path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {"float32"}
    rewrite(
        tmp_path, lambda found: found.update({"lm_head.weight": found["lm_head.weight"].astype(np.float16)})
    )
    # The embedding's dtype, not that of the first tensor.
    assert Phi3ForCausalLM.from_pretrained(tmp_path).dtype == jnp.float32
    convert_checkpoint(tmp_path, tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert {str(kept[name].dtype) for name in kept} == {"float64", "float32", "float16"}
    original = load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(kept[name], original[name]) for name in original)


def test_changes_the_config(tmp_path: Path) -> None:
    theirs_saved("causal", small_config(), tmp_path)
    model = Phi3ForCausalLM.from_pretrained(tmp_path, sliding_window=5, attention_dropout=0.25)
    assert (model.config.sliding_window, model.config.attention_dropout) == (5, 0.25)
    other = small_config(rms_norm_eps=1e-3)
    assert Phi3ForCausalLM.from_pretrained(tmp_path, config=other).config == other
    changed = Phi3ForCausalLM.from_pretrained(tmp_path, config=other, attention_dropout=0.5).config
    assert changed == other.replace(attention_dropout=0.5)
    model = Phi3ForSequenceClassification.from_pretrained(
        tmp_path, id2label={0: "no", 1: "yes", 2: "perhaps"}
    )
    assert values(model)["score.weight"].shape == (3, 48)
    with pytest.raises(TypeError, match="sliding_windo"):
        Phi3ForCausalLM.from_pretrained(tmp_path, sliding_windo=5)


def test_reads_each_tensor_from_the_indexed_shard(tmp_path: Path) -> None:
    """Tensors of the same name in other shards, and tensors and files without an index entry, are ignored."""
    theirs_saved("causal", small_config(), tmp_path, max_shard_size="40KB")
    before = values(Phi3ForCausalLM.from_pretrained(tmp_path))
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    for file in sorted(set(weight_map.values()) - {weight_map[name]}):
        content = load_file(tmp_path / file)
        save_file(
            content | {name: np.full(48, 9.0, np.float32), "leftover": np.ones(3, np.int64)}, tmp_path / file
        )
    save_file({"model.layers.7.foreign": np.ones(3, np.float32)}, tmp_path / "model-99.safetensors")
    after = values(Phi3ForCausalLM.from_pretrained(tmp_path))
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_convert_keeps_bits_tokenizer_and_other_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    theirs_saved("sequence", small_config(num_labels=3), source, "bfloat16", max_shard_size="40KB")
    others = {
        "tokenizer.json": b"{}",
        "generation_config.json": b"{}",
        "modeling.py": b"pass",
        "LICENSE": b"x",
    }
    left = {"pytorch_model.bin": b"pickle", "pytorch_model.bin.index.json": b"{}", "flax_model.msgpack": b""}
    for name, content in (others | left).items():
        (source / name).write_bytes(content)
    convert_checkpoint(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*others, "config.json", "model.safetensors"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == others
    assert_same_bits(tensors(tmp_path / "out"), tensors(source))
    assert config_json(tmp_path / "out")["architectures"] == ["Phi3ForSequenceClassification"]
    assert config_json(tmp_path / "out")["dtype"] == "bfloat16"

    convert_checkpoint(source, tmp_path / "out", dtype="float16", max_shard_size="30KB")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    expected = {name: tensor.astype(np.float16) for name, tensor in tensors(source).items()}
    assert_same_bits(tensors(tmp_path / "out"), expected)
    assert config_json(tmp_path / "out")["dtype"] == "float16"
