"""Phi3Tokenizer matches transformers 5.23 and Microsoft's files, and its back ends match each other."""

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from small_tokenizers import ADDED, reference, write_json
from their_tokenizer import TheirTokenizer
from tokenizers import Tokenizer, decoders, models, processors

from phi3_jax.errors import CheckpointError
from phi3_jax.tokenizer import (
    IncrementalDecoder,
    JsonBackend,
    Phi3Tokenizer,
    SentencePieceBackend,
    _chat,
    _growth,
)

FRAGMENTS = [
    *ADDED,
    "<s>",
    "</s>",
    "<unk>",
    " ",
    "  ",
    "\n",
    "\t",
    "\xa0",
    "\x1c",
    "\u3000",
    "▁",
    "a",
    "the ",
    "dog",
]
FRAGMENTS += ["é", "😀", "👩‍👩‍👧", "漢字", "12", "<|", "|>", "<0x41>", "sword", "_", "\ufeff", "don't", "z9"]


def texts(seed: int, count: int = 200) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(FRAGMENTS, k=generator.randint(0, 10))) for _ in range(count)]


def phi3(find, name: str) -> Phi3Tokenizer:
    return Phi3Tokenizer.from_pretrained(find("phi3-tokenizer", name))


# --- the module


def test_needs_neither_jax_nor_transformers(byte_level_folder):
    """A process that encodes and decodes has loaded neither JAX nor transformers."""
    code = (
        "import sys; from phi3_jax.tokenizer import Phi3Tokenizer; "
        f"tokenizer = Phi3Tokenizer.from_pretrained({str(byte_level_folder)!r}); "
        "assert tokenizer.decode(tokenizer(['the dog']).input_ids[0]) == 'the dog'; "
        "print({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- ids


@pytest.mark.parametrize("name", ["phi-3", "phi-3-mini", "sentencepiece"])
def test_matches_phi3_vectors(shared_data, name):
    vectors = json.loads(shared_data("phi3-tokenizer", "vectors.json").read_text(encoding="utf-8"))
    tokenizer = phi3(shared_data, name)
    assert len(vectors) == 47
    for vector in vectors:
        assert tokenizer.encode(vector["text"], add_special_tokens=False) == vector["ids"], vector["text"]


@pytest.mark.parametrize("backend", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("phi-3-mini", [32010, 6324, 32007, 32001]),
        ("phi-3", [32010, 29871, 13, 18567, 32007, 29871, 13, 32001, 29871, 13]),
    ],
)
def test_white_space_after_special_tokens_depends_on_the_revision(shared_data, tmp_path, backend, name, ids):
    source = shared_data("phi3-tokenizer", name)
    model = shared_data("phi3-tokenizer", "sentencepiece", "tokenizer.model")
    shutil.copyfile(source / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    shutil.copyfile(model if backend == "tokenizer.model" else source / backend, tmp_path / backend)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.backend.file[0] == backend
    assert tokenizer.encode("<|user|>\nHi<|end|>\n<|assistant|>\n", add_special_tokens=False) == ids


def test_phi3_model_alone_matches_tokenizer_json(shared_data):
    alone, full = phi3(shared_data, "sentencepiece"), phi3(shared_data, "phi-3-mini")
    assert isinstance(alone.backend, SentencePieceBackend)
    generator = random.Random(3)
    fragments = [*FRAGMENTS, "<|endoftext|>", "<|placeholder1|>", "ing", "für"]
    for text in ["".join(generator.choices(fragments, k=n % 10)) for n in range(200)]:
        assert alone.encode(text) == full.encode(text), text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    assert alone.apply_chat_template(messages, add_generation_prompt=True) == full.apply_chat_template(
        messages, add_generation_prompt=True
    )
    for name in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "padding_side",
        "vocab_size",
    ):
        assert getattr(alone, name) == getattr(full, name), name
    assert len(alone) == len(full) == 32011
    assert alone.convert_tokens_to_ids(["<|endoftext|>", "<|placeholder4|>", "<|end|>"]) == [
        32000,
        32005,
        32007,
    ]
    assert alone.backend.special_ids == full.backend.special_ids


@pytest.mark.parametrize("name", ["phi-3", "phi-3-mini"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_phi3_revisions_match_transformers(shared_data, tmp_path, name, add_special_tokens):
    """AutoTokenizer with `model_type` phi3 ignores the April revision's add_bos_token, too."""
    for file in shared_data("phi3-tokenizer", name).iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    write_json(tmp_path / "config.json", {"model_type": "phi3"})
    theirs, ours = TheirTokenizer(name, tmp_path), Phi3Tokenizer.from_pretrained(tmp_path)
    given_texts = ["Hello world", " x", "<s>Hi<|end|>\n", "</s> a <s>  b <|end|>  c\n", "😀\n\n<|user|> 漢"]
    ids = [ours.encode(text, add_special_tokens=add_special_tokens) for text in given_texts]
    assert ids == theirs.ask("encode", given_texts, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert [ours.decode(row, skip) for row in ids] == theirs.ask("decode", ids, skip_special_tokens=skip)
    names = ("bos_token", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids", "vocab_size")
    names += ("padding_side", "truncation_side", "model_max_length", "add_bos_token")
    expected = theirs.attributes(*names)
    assert {name: getattr(ours, name) for name in names} | {"length": len(ours)} == expected


def test_back_ends_agree(piece_folders):
    by_model = Phi3Tokenizer.from_pretrained(piece_folders.model)
    by_json = Phi3Tokenizer.from_pretrained(piece_folders.json)
    theirs = reference("pieces", piece_folders.json)
    assert isinstance(by_json.backend, JsonBackend)
    assert len(by_model) == len(by_json) == theirs.attributes()["length"]
    given_texts = texts(seed=0)
    ids = theirs.ask("encode", given_texts)
    for tokenizer in (by_json, by_model):
        assert [tokenizer.encode(text) for text in given_texts] == ids
        for skip in (True, False):
            expected = theirs.ask("decode", ids, skip_special_tokens=skip)
            assert [tokenizer.decode(row, skip) for row in ids] == expected
    for token in ("<s>", "<|end|>", "▁the", "<0x0A>", "no such token"):
        assert by_model.convert_tokens_to_ids(token) == by_json.convert_tokens_to_ids(token)


def test_longest_added_token_wins_and_flags_hold(piece_folders):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.model)
    first = len(piece_folders.pieces)
    assert tokenizer.encode("<tool>s") == [first + 5]
    assert tokenizer.encode("<|end|> \n\xa0<|user|>") == [first, first + 1]
    assert tokenizer.encode("<tool> \n<left>") == [first + 4, first + 6]
    assert first + 7 in tokenizer.encode("a word.")
    assert first + 7 not in tokenizer.encode("a sword")


def test_byte_level_matches_transformers(byte_level_folder, tmp_path):
    """add_bos_token of the config has no effect with a tokenizer.json, even without a post-processor."""
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(tmp_path / "tokenizer_config.json", {**config, "add_bos_token": True})
    theirs, ours = reference("bytes and bos", tmp_path), Phi3Tokenizer.from_pretrained(tmp_path)
    about = theirs.attributes("add_bos_token", "padding_side")
    assert ours.add_bos_token is about["add_bos_token"] is False
    assert ours.padding_side == about["padding_side"] == "right"
    given_texts = [*texts(seed=1), "<|im_start|>user\nHi<|im_end|>", "x <a b>é y"]
    ids = [ours.encode(text) for text in given_texts]
    assert ids == theirs.ask("encode", given_texts)
    assert (
        [ours.decode(row) for row in ids]
        == given_texts
        == theirs.ask("decode", ids, skip_special_tokens=False)
    )


def test_special_tokens_around_a_text_come_from_the_post_processor(byte_level_folder, tmp_path):
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|endoftext|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2), ("<|endoftext|>", 0)],
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    theirs, ours = reference("bytes and template", tmp_path), Phi3Tokenizer.from_pretrained(tmp_path)
    body = ours.encode("the dog", add_special_tokens=False)
    assert ours.encode("the dog") == [1, *body, 2] == theirs.ask("encode", ["the dog"])[0]
    assert ours("the dog", "the dog").input_ids.tolist() == [[1, *body, 2, *body, 0]]
    assert ours.add_bos_token
    assert not Phi3Tokenizer.from_pretrained(byte_level_folder).add_bos_token
    options: dict[str, object] = {"truncation": True, "padding": True}
    given = [("the quick dog", pair) for pair in ("a tokenizer", "the quick dog", None)]
    arguments = [([text], None if pair is None else [pair]) for text, pair in given]
    for length in range(3, 12):
        for special in (True, False):
            options |= {"max_length": length, "add_special_tokens": special}
            expected = [answer["input_ids"] for answer in theirs.ask("__call__", arguments, **options)]
            assert [ours(*each, **options).input_ids.tolist() for each in given] == expected, options


@pytest.mark.parametrize("end", [False, True])
def test_tokenizer_model_takes_bos_and_eos_from_its_config(piece_folders, tmp_path, end):
    shutil.copytree(piece_folders.model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", {**config, "add_bos_token": True, "add_eos_token": end})
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    body = tokenizer.encode("dog", add_special_tokens=False)
    last = [2] if end else []
    assert tokenizer.add_bos_token
    assert tokenizer.encode("dog") == [1, *body, *last]
    assert tokenizer("dog", "dog").input_ids.tolist() == [[1, *body, *last, 1, *body, *last]]


def test_reads_added_tokens_of_old_files(piece_folders, tmp_path):
    """added_tokens.json has the ids, special_tokens_map.json the special ones and their flags."""
    shutil.copyfile(piece_folders.model / "tokenizer.model", tmp_path / "tokenizer.model")
    size = len(piece_folders.pieces)
    write_json(tmp_path / "added_tokens.json", {"<|end|>": size, "<plain>": size + 1, "<|x|>": size + 2})
    end = {"content": "<|end|>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    write_json(
        tmp_path / "special_tokens_map.json", {"eos_token": end, "additional_special_tokens": ["<|x|>"]}
    )
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<|end|>  <plain><|x|>") == [size, size + 1, size + 2]
    assert tokenizer.eos_token_id == size
    assert tokenizer.decode([size, size + 1, size + 2], skip_special_tokens=True) == "<plain>"
    assert tokenizer.all_special_ids == [1, size, 0, size + 2]


def test_named_token_becomes_special(byte_level_folder, tmp_path):
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "he", "unk_token": "not a token"})
    theirs, ours = reference("bytes and named", tmp_path), Phi3Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("other") == theirs.ask("encode", ["other"])[0]
    assert ours.decode(ours.encode("other"), skip_special_tokens=True) == "otr"
    assert (ours.unk_token, ours.unk_token_id) == (None, None)
    assert ours.convert_tokens_to_ids("not a token") is None


# --- text


def test_ids_without_a_token_give_no_text(tokenizer):
    ids = tokenizer.encode("the dog")
    beyond = [len(tokenizer), len(tokenizer) + 60, 2**31, 2**40]
    assert tokenizer.decode([*beyond, *ids, *beyond]) == tokenizer.decode(ids) == "the dog"
    assert tokenizer.convert_ids_to_tokens(beyond) == [None] * 4
    stream = tokenizer.stream()
    assert stream.put([*beyond, *ids]) + stream.end() == "the dog"


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ([1, -1], ValueError, "-1"),
        ([1.0], TypeError, "float"),
        (["a"], TypeError, "str"),
        ("abc", TypeError, "str"),
        ([True], TypeError, "bool"),
        (np.ones((2, 2), np.int32), ValueError, "batch_decode"),
        (np.ones(2), TypeError, "float"),
    ],
)
def test_decode_rejects_other_values_than_ids(piece_folders, ids, error, says):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    with pytest.raises(error, match=says):
        tokenizer.decode(ids)
    with pytest.raises(error, match=says):
        tokenizer.stream().put(ids)


def test_decode_takes_one_id_a_row_or_a_batch(tokenizer):
    ids = tokenizer.encode("the lazy dog")
    array = np.asarray(ids, np.int32)
    assert tokenizer.decode(array) == tokenizer.decode(tuple(ids)) == "the lazy dog"
    assert tokenizer.decode(ids[0]) == tokenizer.decode(array[0]) == tokenizer.decode(ids[:1])
    assert tokenizer.batch_decode(np.stack([array, array])) == ["the lazy dog"] * 2
    assert tokenizer.convert_ids_to_tokens(ids[0]) == tokenizer.convert_ids_to_tokens(array)[0]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a list"]])
def test_encode_rejects_other_values_than_text(tokenizer, text):
    with pytest.raises(TypeError, match="expected a text"):
        tokenizer.encode(text)


def test_encode_rejects_half_of_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode: half of a surrogate pair at 2"):
        tokenizer.encode("a \ud83d")


# --- text as it arrives


def random_ids(tokenizer: Phi3Tokenizer, generator: random.Random) -> list[int]:
    """Returns any ids, bytes of broken and whole characters, special tokens, and ids without a token."""
    size = len(tokenizer)
    bytes_of = [
        i
        for i in range(size)
        if len(token := tokenizer.convert_ids_to_tokens(i) or "") == 1 or token.startswith("<0x")
    ]
    spaces = [i for i in map(tokenizer.convert_tokens_to_ids, ("▁", "▁▁", "Ġ")) if i]
    ids: list[int] = []
    for _ in range(generator.randint(0, 8)):
        kind = generator.randrange(5)
        if kind == 0:
            ids += generator.choices(range(size + 20), k=2)
        elif kind == 1:
            ids += generator.choices(bytes_of, k=generator.randint(1, 5))
        elif kind == 2:
            ids += tokenizer.encode(
                generator.choice(["😀", "é漢", "👩‍👩‍👧\n", "a\n\nb", " \ufeff", "\ufffd"])
            )[1:]
        elif kind == 3:
            ids += generator.choices(spaces, k=1)
        else:
            ids += [*sorted(tokenizer.backend.special_ids)[-1:], size - 1]
    return ids


@pytest.mark.parametrize("skip", [True, False])
def test_stream_adds_up_to_decode(tokenizer, skip):
    generator = random.Random(2)
    for _ in range(250):
        ids = random_ids(tokenizer, generator)
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        stream, parts, done = IncrementalDecoder(tokenizer, skip), [], 0
        while done < len(ids):
            step = generator.randint(1, 4)
            parts.append(stream.put(ids[done] if step == 1 else ids[done : done + step]))
            done += step
        assert "".join([*parts, stream.end()]) == whole, ids
        assert stream.put(ids) + stream.end() == whole, "end() resets the decoder"


def test_stream_returns_text_at_once_and_whole_characters(tokenizer):
    """Plain words come with their token, an emoji only as a whole."""
    stream = tokenizer.stream()
    ids = tokenizer.encode("the dog")
    assert [stream.put(i) for i in ids] == [
        tokenizer.decode(ids[: n + 1])[len(tokenizer.decode(ids[:n])) :] for n in range(len(ids))
    ]
    seen = [stream.put(i) for i in tokenizer.encode("x😀y")]
    assert "".join([*seen, stream.end()]).endswith("x😀y")
    assert all("\ufffd" not in text for text in seen)
    assert any("😀" in text for text in seen), "it waits only while it is uncertain"


def test_stream_looks_up_each_id_once(tokenizer, monkeypatch):
    ids = tokenizer.encode("the dog 😀\n" * 20)
    looked_up = []
    backend = type(tokenizer.backend)
    id_to_token = backend.id_to_token
    monkeypatch.setattr(backend, "id_to_token", lambda self, i: looked_up.append(i) or id_to_token(self, i))
    monkeypatch.setattr(backend, "decode", None)
    stream = tokenizer.stream()
    for i in ids:
        stream.put(i)
    stream.end()
    assert looked_up == ids


def test_stream_waits_for_the_end_with_an_unknown_decoder(byte_level_folder):
    raw = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    raw.decoder = decoders.WordPiece(prefix="Ġ")
    tokenizer = Phi3Tokenizer(JsonBackend(raw.to_str()))
    ids = tokenizer.encode("the dog")
    stream = tokenizer.stream()
    assert stream.put(ids) == ""
    assert stream.end() == tokenizer.decode(ids)


# --- batches


BATCH = ["the quick brown fox", "dog", "", "a tokenizer turns text into ids, all of it"]
PAIRS = ["and more", "the lazy dog does not mind at all", "x", ""]


@pytest.mark.parametrize("kind", ["json", "bytes"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 64},
        {"padding": True, "truncation": True, "max_length": 5},
        {"padding": "max_length", "truncation": "only_first", "max_length": 7, "pad_to_multiple_of": 7},
        {"padding": True, "truncation": True, "max_length": 9, "text_pair": PAIRS},
        {"padding": True, "truncation": True, "max_length": 10, "text_pair": PAIRS},
        {"padding": True, "text_pair": PAIRS},
    ],
)
def test_batches_match_transformers(piece_folders, byte_level_folder, kind, side, options):
    folder = byte_level_folder if kind == "bytes" else piece_folders.json
    sides = {"padding_side": side, "truncation_side": side}
    (theirs,) = reference(kind, folder, **sides).ask("__call__", [BATCH], return_tensors="np", **options)
    ours = Phi3Tokenizer.from_pretrained(folder, **sides)(BATCH, **options)
    assert list(ours) == ["input_ids", "attention_mask"]
    for name, array in ours.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, theirs[name])
        assert getattr(ours, name) is array


def test_one_text_is_a_batch_of_one(tokenizer):
    batch = tokenizer("the dog")
    assert batch.input_ids.tolist() == [tokenizer.encode("the dog")]
    assert batch.attention_mask.tolist() == [[1] * batch.input_ids.shape[1]]
    assert tokenizer("").input_ids.shape == (1, 0)


def test_lengths_and_sides_can_be_set(tokenizer):
    ids = tokenizer.encode("the quick brown fox")
    assert tokenizer("the quick brown fox", max_length=2).input_ids.tolist() == [ids], (
        "whole without truncation"
    )
    tokenizer.model_max_length = 3
    assert tokenizer("the quick brown fox", truncation=True).input_ids.tolist() == [ids[:3]]
    tokenizer.truncation_side = "left"
    assert tokenizer("the quick brown fox", truncation=True).input_ids.tolist() == [ids[-3:]]
    tokenizer.padding_side = "right"
    assert tokenizer(["the quick brown fox", ""]).attention_mask[1].tolist() == [0] * len(ids)
    tokenizer.padding_side = "left"
    assert tokenizer(["the", "the quick brown fox"]).attention_mask[0, 0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([],), "empty list"),
        ((["a", "b"], ["c"]), "2 entries and text_pair 1"),
        ((["a", "the quick dog"], None, {"padding": False}), "cannot form an array"),
        (("a", None, {"padding": "widest"}), "padding='widest'; use one of"),
        (("a", None, {"truncation": "ends"}), "truncation='ends'; use one of"),
        (("a", None, {"truncation": True}), "give max_length"),
        (("a", None, {"padding": "max_length"}), "give max_length"),
        (("the dog", "x", {"truncation": "only_second", "max_length": 1}), "text_pair has only"),
    ],
)
def test_rejects_bad_batches(tokenizer, arguments, says):
    text, pair, options = (*arguments, None, {})[:3] if len(arguments) < 3 else arguments
    with pytest.raises(ValueError, match=says):
        tokenizer(text, pair, **(options or {}))


def test_rejects_a_length_below_the_special_tokens(piece_folders):
    config = {"bos_token": "<s>", "add_bos_token": True}
    model = (piece_folders.model / "tokenizer.model").read_bytes()
    tokenizer = Phi3Tokenizer(SentencePieceBackend(model), config)
    assert tokenizer("dog", truncation=True, max_length=1).input_ids.tolist() == [[1]]
    with pytest.raises(ValueError, match="too short for the special tokens"):
        tokenizer("dog", truncation=True, max_length=0)


@pytest.mark.parametrize("name", ["padding_side", "truncation_side"])
def test_rejects_other_sides_than_left_and_right(piece_folders, name):
    with pytest.raises(ValueError, match=f"{name}='middle'"):
        Phi3Tokenizer.from_pretrained(piece_folders.json, **{name: "middle"})
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    setattr(tokenizer, name, "middle")
    with pytest.raises(ValueError, match=f"{name}='middle'"):
        tokenizer(["a", "b c"], truncation=True, max_length=1)


def test_pads_with_eos_without_a_pad_token(piece_folders, caplog):
    content = (piece_folders.json / "tokenizer.json").read_bytes()
    with_eos = Phi3Tokenizer(JsonBackend(content), {"eos_token": "</s>"})
    for _ in range(2):
        assert with_eos(["the dog", ""]).input_ids[1].tolist()[-1] == 2
    assert caplog.text.count("padding with eos_token '</s>'") == 1
    without = Phi3Tokenizer(JsonBackend(content))
    assert without(["dog", "dog"]).input_ids.shape[0] == 2, "there is nothing to pad"
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        without(["the dog", ""])


# --- conversations


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there>"},
    {"role": "assistant", "content": "Hello "},
    {"role": "user", "content": "1 < 2?"},
]
MINI = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi <there><|end|>\n"
MINI += "<|assistant|>\nHello <|end|>\n<|user|>\n1 < 2?<|end|>\n"


def with_tokens(folder: Path, *contents: str) -> Phi3Tokenizer:
    """Returns the small byte-level vocabulary with more tokens, no template, and an eos token."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_special_tokens(list(contents))
    return Phi3Tokenizer(JsonBackend(raw.to_str()), {"eos_token": "<|endoftext|>"})


def test_renders_phi3_minis_template(piece_folders):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == MINI + "</s>"
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == MINI + "<|assistant|>\n"
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids == tokenizer.encode(prompt, add_special_tokens=False)


def test_recognises_phi4_mini_by_its_large_vocabulary(byte_level_folder):
    tokens = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    small = with_tokens(byte_level_folder, *tokens)
    assert small.apply_chat_template(CHAT, tokenize=False) == MINI + "<|endoftext|>"
    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(200_000)}, unk_token="w0"))
    raw.add_special_tokens([*tokens, "<|endoftext|>"])
    large = Phi3Tokenizer(JsonBackend(raw.to_str()), {"eos_token": "<|endoftext|>"})
    expected = MINI.replace("\n", "")
    assert large.apply_chat_template(CHAT, tokenize=False) == expected + "<|endoftext|>"
    prompt = large.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|assistant|>"


def test_renders_phi4s_template(byte_level_folder):
    tokenizer = with_tokens(byte_level_folder, "<|im_sep|>")
    text = tokenizer.apply_chat_template(CHAT[1:3], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user<|im_sep|>Hi <there><|im_end|><|im_start|>assistant<|im_sep|>Hello <|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    )


@pytest.mark.parametrize(
    ("member", "default"),
    [
        ("phi-3-mini-4k-instruct", _chat.PHI3_MINI_TEMPLATE),
        ("phi-4-mini-instruct", _chat.PHI4_MINI_TEMPLATE),
        ("phi-4", _chat.PHI4_TEMPLATE),
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_default_templates_match_the_members_own(shared_data, piece_folders, member, default, prompt):
    own = shared_data("phi3-configs", member, "chat_template.txt").read_text(encoding="utf-8")
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    options = {"tokenize": False, "add_generation_prompt": prompt}
    expected = tokenizer.apply_chat_template(CHAT, chat_template=own, **options)
    assert tokenizer.apply_chat_template(CHAT, chat_template=default, **options) == expected


def test_every_members_template_matches_transformers(shared_data, piece_folders):
    theirs = reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    templates = sorted(shared_data("phi3-configs").glob("*/chat_template*.txt"))
    assert len(templates) >= 8
    for path in templates:
        for prompt in (True, False):
            options = {
                "chat_template": path.read_text(encoding="utf-8"),
                "add_generation_prompt": prompt,
                "tokenize": False,
            }
            (expected,) = theirs.ask("apply_chat_template", [CHAT], **options)
            assert ours.apply_chat_template(CHAT, **options) == expected, path


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}\n  {% if loop.last %}{% break %}{% endif %}\n  {{ m.role }}\n{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ sep_token }}{{ documents is none }}",
        "{{ strftime_now('%Y') | length }} {{ name | default('nobody') }} {{ tools | tojson }}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_names_and_filters_of_templates_match_transformers(piece_folders, template):
    theirs = reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    options = {"chat_template": template, "tokenize": False, "name": "Ada", "tools": [{"name": "<f> é"}]}
    assert [ours.apply_chat_template(CHAT, **options)] == theirs.ask("apply_chat_template", [CHAT], **options)


def test_templates_know_the_date(piece_folders):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    template, pattern = "{{ strftime_now('%Y-%m-%d %H') }}", "%Y-%m-%d %H"
    before = datetime.now().strftime(pattern)
    rendered = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert rendered in (before, datetime.now().strftime(pattern))


def test_continue_final_message_matches_transformers(piece_folders):
    theirs = reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    plain = ours.chat_template
    for template in (plain, plain.replace("message['content']", "(message['content'] | trim)")):
        options = {"chat_template": template, "tokenize": False, "continue_final_message": True}
        expected = theirs.ask("apply_chat_template", [CHAT[:3]], **options)
        assert [ours.apply_chat_template(CHAT[:3], **options)] == expected
    text = ours.apply_chat_template(CHAT[:3], tokenize=False, continue_final_message=True)
    assert text.endswith("<|assistant|>\nHello ")
    with pytest.raises(ValueError, match="exclude each other"):
        ours.apply_chat_template(CHAT, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="leaves out the final message"):
        ours.apply_chat_template(CHAT, continue_final_message=True, chat_template="nothing")


def test_later_template_sources_override_earlier_ones(piece_folders, tmp_path):
    shutil.copytree(piece_folders.json, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def render(**options: object) -> str:
        tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
        return tokenizer.apply_chat_template(CHAT, tokenize=False, **options)

    assert render().startswith("<|system|>\n")
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "tools"}]
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": several})
    assert (render(), render(tools=[]), render(chat_template="tool_use")) == ("one", "tools", "tools")
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": several[1:]})
    with pytest.raises(ValueError, match=r"one of \['tool_use'\]"):
        render()
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": "two"})
    assert render() == "two"
    write_json(tmp_path / "chat_template.json", {"chat_template": "three"})
    assert render() == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert render() == "four"
    assert render(chat_template="five") == "five"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template failed: roles must alternate"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__mro__|undefined"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% for m in messages %}\n{{ m }", "line 2"),
    ],
)
def test_reports_failing_templates(piece_folders, template, says):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    with pytest.raises(ValueError, match=says):
        tokenizer.apply_chat_template(CHAT, chat_template=template)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        ("Hi", "must be a list of dicts, got str"),
        ({"role": "user", "content": "Hi"}, "must be a list of dicts, got dict"),
        (["Hi"], r"messages\[0\] must be a dict, got str"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\] has no content"),
        ([{}], r"messages\[0\] has no role and no content"),
        ([{"role": 1, "content": "Hi"}], "must be a str, got 1"),
        ([{"role": "user", "contents": "Hi"}], r"messages\[0\] has no content; its keys"),
        ([{"role": "user", "content": object()}], "must consist of JSON values"),
        ([{"role": "owner", "content": "Hi"}], "role 'owner' is not system, user or assistant"),
    ],
)
def test_rejects_messages_that_are_not_a_conversation(piece_folders, messages, says):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    with pytest.raises(ValueError, match=says):
        tokenizer.apply_chat_template(messages)


def test_rejects_chats_without_a_template(byte_level_folder):
    tokenizer = Phi3Tokenizer.from_pretrained(byte_level_folder)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)
    assert tokenizer.apply_chat_template(CHAT, chat_template="x", tokenize=False) == "x"


# --- files


def test_save_writes_the_files_that_were_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "from")
    (tmp_path / "from" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path / "from")
    shutil.rmtree(tmp_path / "from" / "nothing", ignore_errors=True)
    paths = tokenizer.save_pretrained(tmp_path / "to" / "here")
    saved = {Path(path).name for path in paths}
    assert saved == {path.name for path in (tmp_path / "to" / "here").iterdir()}
    assert saved == {path.name for path in (tmp_path / "from").iterdir()}
    for name in saved:
        assert (tmp_path / "to" / "here" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()
    if "tokenizer.json" in saved:
        theirs = reference(f"saved {folder.name[:4]}", tmp_path / "to" / "here")
        assert theirs.ask("encode", ["the dog"])[0] == tokenizer.encode("the dog")


def test_save_keeps_changed_attributes(folder, tmp_path):
    tokenizer = Phi3Tokenizer.from_pretrained(folder, truncation_side="left", model_max_length=77)
    tokenizer.padding_side = "right"
    tokenizer.chat_template = "{{ 'mine' }}"
    tokenizer.save_pretrained(tmp_path)
    again = Phi3Tokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.truncation_side, again.model_max_length) == ("right", "left", 77)
    assert again.apply_chat_template(CHAT, tokenize=False) == "mine"
    assert again.encode("<|end|> the <tool>") == tokenizer.encode("<|end|> the <tool>")
    again.chat_template = {"default": "one", "other": "two"}
    again.save_pretrained(tmp_path / "named")
    named = Phi3Tokenizer.from_pretrained(tmp_path / "named")
    assert named.apply_chat_template(CHAT, tokenize=False, chat_template="other") == "two"


def test_saved_model_alone_loads_in_transformers(shared_data, tmp_path):
    ours = phi3(shared_data, "sentencepiece")
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    theirs = TheirTokenizer("saved model", tmp_path)
    text = "Hello<|end|>\n<|user|>"
    assert theirs.ask("encode", [text])[0] == ours.encode(text) == [15043, 32007, 32010]
    assert theirs.attributes("eos_token_id")["eos_token_id"] == ours.eos_token_id == 32000


def test_saved_json_alone_loads_in_transformers(byte_level_folder, tmp_path):
    Phi3Tokenizer(JsonBackend((byte_level_folder / "tokenizer.json").read_bytes())).save_pretrained(tmp_path)
    ids = Phi3Tokenizer.from_pretrained(byte_level_folder).encode("the dog")
    assert TheirTokenizer("saved json", tmp_path).ask("encode", ["the dog"])[0] == ids


def test_failed_save_leaves_the_old_file(piece_folders, tmp_path, monkeypatch):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.padding_side = "right"

    replace, refused = os.replace, list[Path]()

    def refuse(source: Path, target: Path) -> None:
        if target == tmp_path / "tokenizer_config.json" and not refused:
            refused.append(target)
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="disk full; nothing was changed"):
        tokenizer.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rejects_missing_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"looked for tokenizer.json and tokenizer.model, found config.json"
    ):
        Phi3Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        Phi3Tokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b'{"model":\n  {,}}', r"tokenizer.json is not valid JSON: .* at line 2 column 4"),
        ("tokenizer.json", b"{}", "tokenizer.json is JSON, but not a tokenizer"),
        (
            "tokenizer_config.json",
            b'{"bos_token": "<s>"',
            r"tokenizer_config.json is not valid JSON: .* at line 1 column 20",
        ),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json must hold a JSON object, got list"),
        ("special_tokens_map.json", b"", "special_tokens_map.json is not valid JSON"),
        ("tokenizer_config.json", b'{"a": "\xff\xfe"}', "tokenizer_config.json is not valid UTF-8"),
    ],
)
def test_rejects_broken_json(piece_folders, tmp_path, name, content, says):
    shutil.copytree(piece_folders.json, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Phi3Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_rejects_a_broken_model(piece_folders, tmp_path, damage):
    content = (piece_folders.model / "tokenizer.model").read_bytes()
    broken = {"cut": content[: len(content) // 2], "empty": b"", "text": b"version https://git-lfs"}[damage]
    (tmp_path / "tokenizer.model").write_bytes(broken)
    with pytest.raises(ValueError, match=r"tokenizer\.model is"):
        Phi3Tokenizer.from_pretrained(tmp_path)


def test_rejects_a_model_with_a_broken_piece(piece_folders):
    content = (piece_folders.model / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match=r"here holds a piece that is not valid UTF-8"):
        SentencePieceBackend(content.replace("▁the".encode(), b"\xff" * 6), "here")


def test_rejects_an_added_token_without_text(piece_folders):
    content = (piece_folders.json / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"added_tokens_decoder\['500'\] must have a text"):
        Phi3Tokenizer(JsonBackend(content), {"added_tokens_decoder": {"500": {"special": True}}})


def test_rejects_an_added_token_with_a_pieces_id(piece_folders):
    model = (piece_folders.model / "tokenizer.model").read_bytes()
    config = {"added_tokens_decoder": {"300": {"content": "<|user|>"}}}
    with pytest.raises(ValueError, match=r"'<\|user\|>' has id 300, which is the piece"):
        Phi3Tokenizer(SentencePieceBackend(model), config)


def sequence(*steps: dict[str, object], kind: str = "normalizers") -> dict[str, object]:
    return {"type": "Sequence", kind: list(steps)}


def replace_step(old: object, new: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": old, "content": new}


@pytest.mark.parametrize(
    ("section", "steps", "says"),
    [
        (
            "normalizer",
            replace_step({"String": "a"}, "a" * 10**6),
            "its normalizer may make 1,000,000 charact",
        ),
        (
            "normalizer",
            sequence(*[replace_step({"String": "a"}, "aa")] * 30),
            "may make 128 characters of one",
        ),
        ("normalizer", replace_step({"Regex": "(?=.)"}, "b" * 64), "may make 65 characters"),
        ("normalizer", replace_step({"Regex": "x*"}, "b" * 64), "may make 65 characters"),
        ("normalizer", {"type": "Prepend", "prepend": "c" * 999}, "may make 1,000 characters"),
        (
            "decoder",
            sequence(replace_step({"String": "a"}, "b" * 99), {"type": "Fuse"}, kind="decoders"),
            "its decoder may make 99",
        ),
    ],
)
def test_rejects_files_that_multiply_texts(piece_folders, section, steps, says):
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=rf"here\.json: .*{says}"):
        JsonBackend(json.dumps(content | {section: steps}), "here.json")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("model", "vocab", "▁the"), 2**31, "the token '▁the' has the id 2147483648; ids below 10,000,000"),
        (("added_tokens", 0, "id"), 2**32 - 1, "the token '<unk>' has the id 4294967295"),
        (
            ("post_processor", "special_tokens", "<s>", "ids"),
            [2**31],
            "adds the id 2147483648, which is no token",
        ),
        (
            ("post_processor", "single", 0, "SpecialToken", "id"),
            "x",
            "breaks the library `tokenizers`: no entry",
        ),
    ],
)
def test_rejects_ids_and_panics_of_hostile_files(piece_folders, path, value, says):
    """The library makes room for every id up to the largest, and ends the process if there is none."""
    raw = Tokenizer.from_file(str(piece_folders.json / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    content = entry = json.loads(raw.to_str())
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(ValueError, match=rf"here\.json.*{says}"):
        Phi3Tokenizer(JsonBackend(json.dumps(content), "here.json"))


def test_large_numbers_in_texts_are_no_ids(piece_folders):
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    content["added_tokens"].append(dict(content["added_tokens"][0], id=400, content='x": 123456789'))
    assert JsonBackend(json.dumps(content), "here.json").token_to_id('x": 123456789') == 400


def test_rejects_a_map_of_characters_that_multiplies_texts(piece_folders, tmp_path):
    """SentencePiece compiles such a map into its model; a tokenizer.json has the same one."""
    (tmp_path / "rules.tsv").write_text("78\t" + " ".join(["63"] * 99) + "\n")  # x becomes 99 times c
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=6,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"),
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="here: its map of characters may make 99 characters of one"):
        SentencePieceBackend(model.getvalue(), "here")
    spec = next(spec for number, spec in _growth._fields(model.getvalue()) if number == 3)
    charsmap = next(content for number, content in _growth._fields(spec) if number == 2)
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="here: its normalizer may make 99 characters"):
        JsonBackend(json.dumps(content | {"normalizer": step}), "here")


def test_accepts_files_that_lengthen_texts_a_little(piece_folders):
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    steps = sequence(
        {"type": "NFKC"}, replace_step({"Regex": " {2,}"}, "▁"), replace_step({"String": "``"}, '"')
    )
    backend = JsonBackend(json.dumps(content | {"normalizer": steps}), "here.json")
    assert backend.encode("a")
