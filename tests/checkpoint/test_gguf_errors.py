"""GGUF files that are damaged, hostile or not supported are errors that name file, key and value."""

import re
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import (
    HIDDEN,
    sentencepiece,
    stored_layout,
    tokenizer_source,
    weights,
    write_gguf,
)

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.errors import UserError
from phi3_jax.model.loading import load_abstract
from phi3_jax.sources import gguf_file


def change(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None
) -> dict[str, np.ndarray]:
    out = dict(tensors)
    if shape is None:
        del out[name]
    else:
        out[name] = np.ones(shape, np.float32)
    return out


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.1.ffn_gate.weight", None, r"tensor 'blk\.1\.ffn_gate\.weight' is missing"),
        ("token_embd.weight", None, r"tensor 'token_embd\.weight' is missing"),
        ("blk.0.attn_k.weight", (HIDDEN, HIDDEN), r"attn_k\.weight' has shape \(128, 128\).*\(64, 128\)"),
        ("blk.0.attn_q.bias", (HIDDEN,), r"'blk\.0\.attn_q\.bias' .*no biases"),
        ("blk.0.ffn_gate_inp.weight", (4, HIDDEN), r"'blk\.0\.ffn_gate_inp\.weight'"),
        ("rope_freqs.weight", (3,), r"3 factors; 32 rotary dims need 16"),
        ("rope_factors_long.weight", (16,), r"'rope_factors_short\.weight' is missing"),
    ],
)
def test_rejects_tensors_that_do_not_fit(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    tensors = change(stored_layout(weights(fused=False)), name, shape)
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", tensors))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.embedding_length": None}, r"lacks 'llama\.embedding_length'"),
        ({"llama.rope.dimension_count": 16}, r"dimension_count = 16"),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
        ({"llama.attention.value_length": 16}, r"width 32 and values of width 16"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope scaling 'longrope'"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"differs between layers: \[2, 1\]"),
        ({"split.count": 3}, r"one of 3 parts"),
    ],
)
def test_rejects_metadata_that_does_not_fit(tmp_path: Path, extra: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", stored_layout(weights(fused=False)), extra=extra))


def test_rejects_other_architectures(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "qwen2", {"x": np.ones((2, 32), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"architecture 'qwen2' is not supported; supported: llama, phi3"
    ):
        GGUFSource(path)


def test_rejects_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFSource(path)
    for content in (b"", b"PK\x03\x04zip"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            GGUFSource(path)


def test_rejects_truncated_files(llama_file: Path) -> None:
    """A file cut in its tensors is reported with name and sizes, one cut in its header without."""
    whole = llama_file.read_bytes()
    cut = llama_file.with_name("cut.gguf")
    cut.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(
        CheckpointError,
        match=rf"cut short: tensor 'output\.weight' ends at byte {len(whole):,}, the file has",
    ):
        GGUFSource(cut)
    for length in (6, 20, 300, 900):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="header is damaged or cut short"):
            GGUFSource(cut)


def test_rejects_unknown_quantizations(tmp_path: Path, llama_file: Path) -> None:
    """Q8_1 is known but cannot be dequantized; 250 is not a type."""
    content = bytearray(llama_file.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == struct.pack("<I", Kind.F32)
    path = tmp_path / "b.gguf"
    for number, message in (
        (Kind.Q8_1, r"'blk\.0\.ffn_up\.weight' is stored as Q8_1"),
        (250, r"ffn_up.* as type 250"),
    ):
        content[at : at + 4] = struct.pack("<I", number)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            GGUFSource(path)


def opened(path: Path) -> str | None:
    """Reads all but the tensors; returns the message of the error, or None."""
    try:
        source, _ = open_checkpoint(path)
        source.generation_config()
        source.tokenizer()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.attention.head_count", 0, r"llama\.attention\.head_count = 0 must be a positive integer"),
        ("llama.block_count", 2**31 - 1, r"block_count = 2147483647, but the file has \d+ tensors"),
        ("llama.embedding_length", "wide", r"llama\.embedding_length = 'wide' must be a positive integer"),
        ("llama.feed_forward_length", [64, 0], r"feed_forward_length = \[64, 0\] must be"),
        ("llama.rope.freq_base", float("nan"), r"llama\.rope\.freq_base = nan must be a finite number"),
        ("llama.rope.freq_base", 0.5, r"rope_theta=0\.5 must be a number above 1"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, r"rms_norm_eps=0\.0 must be a positive number"),
        ("llama.rope.scaling.type", 3, r"llama\.rope\.scaling\.type = 3 must be a text"),
        ("tokenizer.ggml.tokens", [1, 2], r"tokenizer\.ggml\.tokens = \[1, 2\] must be a list of texts"),
        ("tokenizer.ggml.eos_token_id", "x", r"eos_token_id = 'x' must be a token id"),
        ("tokenizer.ggml.scores", ["a"], r"tokenizer\.ggml\.scores = \['a'\] must be a list of numbers"),
        ("tokenizer.ggml.model", True, r"tokenizer\.ggml\.model = True must be a text"),
        ("split.count", "2", r"split\.count = '2' must be an integer"),
    ],
)
def test_odd_metadata_is_a_named_error(tmp_path: Path, key: str, value: object, says: str) -> None:
    tokenizer = {name: each for name, each in sentencepiece().items() if name != key}
    tensors = stored_layout(weights(fused=False))
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, extra={key: value}, tokenizer=tokenizer)
    message = opened(path)
    assert message is not None
    assert message.startswith(f"{path}: ")
    assert re.search(says, message)


class Values:
    """Stands in for the reader of a file that has one value under every key."""

    def __init__(self, value: object):
        self.types: list[object] = []
        self.contents = lambda: value
        self.get_field = lambda key: self


@pytest.mark.parametrize("key", gguf_file._RULES)
def test_every_key_has_a_rule_for_its_value(key: str) -> None:
    file = object.__new__(gguf_file.GGUFFile)
    file.path, file.architecture = Path("here.gguf"), "llama"
    refused = 0
    for value in (0, -1, 2**62, 1.5, float("nan"), "x", True, [1], [0, 0], ["a"], "9" * 999):
        file._reader = Values(value)
        try:
            assert file.metadata(key) == value
        except CheckpointError as error:
            refused += 1
            pattern = rf"here\.gguf: {re.escape(key.replace('{arch}', 'llama'))} = .{{1,80}} must be "
            assert re.match(pattern, str(error))  # noqa: PT017
    assert refused >= 6


def header(keys: int, tensors: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text("some.key") + struct.pack("<IIQ", 9, kind, count) + content


@pytest.mark.parametrize(
    "content",
    [
        header(1, 0, array(0, 10**10)),
        header(1, 0, array(8, 10**10)),
        header(1, 0, array(0, 2**63)),
        header(1, 0, array(0, gguf_file.MOST_ELEMENTS + 1, bytes(2 * gguf_file.MOST_ELEMENTS))),
        header(1, 0, text("some.key") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
        header(2**40, 0, bytes(100)),
        header(0, 2**40, bytes(100)),
        header(1, 0, text("some.key") + struct.pack("<IQ", 8, 2**50)),
        header(0, 1, text("a") + struct.pack("<I", 2**31)),
        header(0, 1, text("a") + struct.pack("<I", 2) + struct.pack("<QQ", 2**40, 2**40) + bytes(12)),
    ],
    ids=[
        *("bytes", "texts", "overflow", "many", "nested", "keys", "tensors", "text", "dimensions", "product"),
    ],
)
def test_counts_of_a_header_are_limited(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"^{path}: the (GGUF header is damaged|file is cut short)"):
        GGUFSource(path)
    assert time.monotonic() - begin < 30  # without a limit, hours


def test_layers_are_counted_before_they_are_built(llama_file: Path) -> None:
    config = Phi3Config.from_dict(GGUFSource(llama_file).config_dict()).replace(num_hidden_layers=2**30)
    with pytest.raises(
        CheckpointError, match=r"num_hidden_layers=1073741824, and the files have \d+ tensors"
    ):
        Phi3ForCausalLM.from_pretrained(llama_file, config=config)
    with pytest.raises(CheckpointError, match="num_hidden_layers=1073741824"):
        load_abstract(Phi3ForCausalLM, llama_file, config=config)


def test_long_pieces_are_refused(tmp_path: Path) -> None:
    """Every split of a piece is tried."""
    metadata = sentencepiece()
    tokens = list(metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    normal = metadata["tokenizer.ggml.token_type"].index(1)  # type: ignore[attr-defined]
    tokens[normal] = "a" * 10**6
    source = tokenizer_source(tmp_path, metadata | {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(CheckpointError, match="a piece of 1,000,000 characters; at most 256 are read"):
        source.tokenizer()
