"""Phi3Tokenizer matches transformers 5.23 and Microsoft's files, and its back ends match each other."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_tokenizers import ADDED, reference, write_json
from their_tokenizer import TheirTokenizer
from tokenizers import Tokenizer, decoders, processors

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import (
    IncrementalDecoder,
    JsonBackend,
    Phi3Tokenizer,
    SentencePieceBackend,
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


# --- batches of texts


def test_a_batch_has_the_ids_of_each_text(folder):
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    several = [*texts(3), *texts(3)[:5], ""]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in several]
    assert tokenizer.encode_batch(several) == expected
    assert tokenizer.encode_batch([]) == []
    with pytest.raises(UserError, match="half of a surrogate pair at 1"):
        tokenizer.encode_batch(["a", "b\ud800"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [False, True])
def test_surrounds_and_cuts_ids_as_a_call_does(byte_level_folder, tmp_path, side, special):
    tokenizer = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A $B <|im_end|>",
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )  # fmt: skip
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Phi3Tokenizer.from_pretrained(tmp_path, truncation_side=side)
    pairs = [("the lazy dog", "minds"), ("a", "the quick brown fox"), ("dog", ""), ("x", "y")]
    for first, second in pairs:
        ids, pair_ids = ours.encode_batch([first, second])
        for length in (None, 2, 3, 5, 8, 200):
            cut = {} if length is None else {"truncation": True, "max_length": length}
            expected = ours(first, padding=False, **cut).input_ids[0].tolist()
            assert ours.surround(ids, max_length=length) == expected
            expected = ours(first, second, padding=False, **cut).input_ids[0].tolist()
            assert ours.surround(ids, pair_ids, max_length=length) == expected
    if special:
        with pytest.raises(UserError, match="1 too short for the special tokens"):
            ours.surround([5], max_length=0)
