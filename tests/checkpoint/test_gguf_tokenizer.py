"""Tokenizers of GGUF files match those that they were made of, and transformers reads them."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from answers import stored
from gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    TEMPLATE,
    UNUSED,
    USER,
    byte_level,
    sentencepiece,
    tokenizer_source,
)
from marks import slow
from tokenizers import Regex, Tokenizer, pre_tokenizers

from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.sources.gguf_tokenizer import SPLITS
from phi3_jax.tokenizer import Phi3Tokenizer


def load(files: Mapping[str, object]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", " ab123's", ["Ġab", "1", "2", "3", "'s"]),
        ("gpt-2", " ab1234's", ["Ġab", "123", "4", "'s"]),
        ("llama-bpe", "ab1234's", ["<|im_start|>", "ab", "123", "4", "'s"]),
        ("gpt-4o", "ab1234 ab's", ["ab", "123", "4", "Ġab", "'s"]),
        # gpt-4o starts a word at a capital after small letters; llama's rule does not.
        ("gpt-4o", "aAb", ["a", "Ab"]),
        ("dbrx", "aAb", ["a", "Ab"]),
        ("smollm", "<|im_start|>ab<tool>ab<|im_end|>", ["<|im_start|>", "ab", "<tool>", "ab", "<|im_end|>"]),
    ],
)
def test_builds_byte_level_tokenizers(tmp_path: Path, pre: str, text: str, tokens: list[str]) -> None:
    tokenizer = load(tokenizer_source(tmp_path, byte_level(pre)).tokenizer_files())
    encoding = tokenizer.encode(text)
    assert encoding.tokens == tokens
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(plain.ids, skip_special_tokens=False) == text


def test_splits_match_cl100k_and_o200k() -> None:
    """The text is one that the two cut differently."""
    text = "I'M HelloWorld café  12345\n\n  x/=y//\r\n"
    cut = {
        name: [
            piece for piece, _ in pre_tokenizers.Split(Regex(SPLITS[name]), "isolated").pre_tokenize_str(text)
        ]
        for name in ("dbrx", "gpt-4o")
    }
    shared = ["123", "45", "\n\n", " "]
    assert cut["dbrx"] == ["I", "'M", " HelloWorld", " café", " ", " ", *shared, " x", "/=", "y", "//\r\n"]
    assert cut["gpt-4o"] == ["I'M", " Hello", "World", " café", " ", " ", *shared, " x", "/=", "y", "//\r\n"]


def test_writes_the_files_beside_the_tokenizer(tmp_path: Path) -> None:
    files = tokenizer_source(tmp_path, byte_level("smollm")).tokenizer_files()
    config = files["tokenizer_config.json"]
    assert isinstance(config, dict)
    assert config["added_tokens_decoder"]["3"] == {
        "content": "<tool>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    assert config["added_tokens_decoder"]["2"]["special"] is True
    assert sorted(config["added_tokens_decoder"]) == ["0", "1", "2", "3"]
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    assert (config["padding_side"], config["model_max_length"], config["add_bos_token"]) == (
        "left",
        256,
        False,
    )
    assert config["chat_template"] == TEMPLATE
    # The turn ends with <|im_end|>; with the file's eos alone, generation would not stop.
    assert files["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2}
    # The padding rows of the embedding have no tokens.
    assert load(files).get_vocab_size() == 22


@stored
def tokenized_by_transformers(files: dict[str, Any], text: str) -> dict[str, Any]:
    """Returns the ids and the prompt of transformers' tokenizer, loaded from these files."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "ab"}]
    return {
        "ids": tokenizer(text)["input_ids"],
        "padding_side": tokenizer.padding_side,
        "prompt": tokenizer.apply_chat_template(messages, tokenize=False),
    }


def test_transformers_reads_the_files(tmp_path: Path) -> None:
    source = tokenizer_source(tmp_path, byte_level("smollm", **{"tokenizer.ggml.add_bos_token": True}))
    files = source.tokenizer_files()
    text = "<|im_start|>ab12<tool> ab<|im_end|>"
    theirs = tokenized_by_transformers({**files, "config.json": source.config_dict()}, text)
    assert theirs["ids"] == load(files).encode(text).ids
    assert theirs["ids"][:2] == [1, 1]
    assert theirs["padding_side"] == "left"
    assert theirs["prompt"] == "<|im_start|>ab<|im_end|>"


def test_sentencepiece_tokenizer_merges_by_score(tmp_path: Path) -> None:
    tokenizer = load(tokenizer_source(tmp_path, sentencepiece()).tokenizer_files())
    # bc joins first (-2), then ▁a (-5): nothing is left for ab or abc.
    assert tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
    # é and the line break have no piece: bytes.
    assert tokenizer.encode("é\na").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>", "<0x0A>", "a"]
    for text in ("abc ab", "  aé\nb"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    no_prefix = sentencepiece(
        **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    )
    tokenizer = load(tokenizer_source(tmp_path, no_prefix).tokenizer_files())
    assert tokenizer.encode("ab c").tokens == ["ab", "▁", "c"]
    assert tokenizer.decode(tokenizer.encode(" ab c").ids) == " ab c"


def test_sentencepiece_of_phi3_removes_space_after_special_tokens(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "<|user|>\n{{ x }}<|end|>\n"}
    files = tokenizer_source(tmp_path, sentencepiece(**extra), "phi3").tokenizer_files()
    tokenizer = load(files)
    ids = tokenizer.encode("<|user|>\nab<|end|>\n").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["<|user|>", "▁a", "b", "<|end|>"]
    assert tokenizer.encode("<|endoftext|> a").tokens == ["<|endoftext|>", "▁", "▁a"]
    assert files["generation_config.json"] == {
        "bos_token_id": 1,
        "eos_token_id": [14, 16],
        "pad_token_id": 14,
    }
    files = tokenizer_source(tmp_path, sentencepiece(**extra), "llama").tokenizer_files()
    assert load(files).encode("<|end|>\nab").tokens == ["<|end|>", "▁", "<0x0A>", "ab"]


@pytest.mark.parametrize(
    ("revision", "architecture"),
    [("phi-3", "llama"), slow("phi-3-mini", "phi3")],
)
def test_rebuilds_phi3s_own_tokenizer(
    tmp_path: Path, shared_data: Callable[..., Path], revision: str, architecture: str
) -> None:
    """Microsoft's tokenizer.json follows from llama.cpp's metadata: 61,249 merges from 32,000 scores."""
    spm = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    spm.Load(str(shared_data("phi3-tokenizer", "sentencepiece", "tokenizer.model")))
    original = json.loads(
        shared_data("phi3-tokenizer", revision, "tokenizer.json").read_text(encoding="utf-8")
    )
    size = 32064
    tokens, scores, types = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size, [UNUSED] * size
    for i in range(spm.vocab_size()):
        tokens[i], scores[i] = spm.IdToPiece(i), spm.GetScore(i)
        types[i] = BYTE if spm.IsByte(i) else NORMAL
    for token in original["added_tokens"]:
        i = token["id"]
        tokens[i], scores[i], types[i] = token["content"], -1000.0, CONTROL if token["special"] else USER
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_bos_token": False,
    }
    metadata |= {"bos_token_id": 1, "eos_token_id": 32000, "unknown_token_id": 0, "padding_token_id": 32000}
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    rebuilt = tokenizer_source(tmp_path, keys, architecture).tokenizer_files()["tokenizer.json"]
    assert isinstance(rebuilt, dict)
    merges = [tuple(merge.split(" ")) for merge in original["model"].pop("merges")]
    assert [tuple(merge) for merge in rebuilt["model"].pop("merges")] == merges
    vocab = original["model"].pop("vocab")
    assert {token: i for token, i in rebuilt["model"].pop("vocab").items() if i < 32000} == vocab
    rebuilt["model"].pop("ignore_merges")  # newer than the original's format
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert rebuilt[part] == original[part], part


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_level("qwen2"), r"pre 'qwen2' is not supported; supported: gpt-2, smollm"),
        (byte_level("default"), r"pre 'default' is not supported"),
        (byte_level("smollm", **{"tokenizer.ggml.model": "bert"}), r"model 'bert' is not supported"),
        (byte_level("smollm", **{"tokenizer.ggml.merges": ["a zz"]}), r"vocabulary and merges do not fit"),
        (byte_level("smollm", **{"tokenizer.ggml.merges": ["azz"]}), r"'azz', which is not a pair"),
        (byte_level("smollm", **{"tokenizer.ggml.eos_token_id": 77}), r"'eos_token': 77\} lies outside"),
        (
            byte_level("smollm", **{"tokenizer.ggml.token_type": [1, 1]}),
            r"token_type has 2 values for 40 tokens",
        ),
        (sentencepiece(**{"tokenizer.ggml.scores": None}), r"lacks 'tokenizer\.ggml\.scores'"),
    ],
)
def test_rejects_tokenizers_that_cannot_be_built(
    tmp_path: Path, tokenizer: dict[str, object], message: str
) -> None:
    source = tokenizer_source(tmp_path, tokenizer)
    with pytest.raises(CheckpointError, match=message):
        source.tokenizer_files()


def test_file_without_tokenizer_has_generation_config_only(llama_file: Path) -> None:
    assert GGUFSource(llama_file).tokenizer_files() == {"generation_config.json": {}}


def test_tokenizer_of_a_file_alone(tmp_path: Path) -> None:
    """It needs neither JAX nor the tensors, and can be saved."""
    source = tokenizer_source(tmp_path, sentencepiece())
    ours = Phi3Tokenizer.from_pretrained(str(source.path), padding_side="right")
    assert ours.encode("a ab<|end|>") == source.tokenizer().encode("a ab<|end|>")
    assert (ours.model_max_length, ours.padding_side) == (256, "right")
    ours.save_pretrained(tmp_path / "saved")
    assert Phi3Tokenizer.from_pretrained(tmp_path / "saved").encode("a ab") == ours.encode("a ab")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        Phi3Tokenizer.from_pretrained(tokenizer_source(tmp_path, {}).path)
