"""Phi-3-small's file of ranks gives tiktoken's ids and Microsoft's special tokens."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from rank_files import RANKS, SPECIAL, TheirRanks, ids_digest, rank_file, sized_tokens
from small_tokenizers import write_json
from their_tokenizer import TheirTokenizer
from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import JsonBackend, Phi3Tokenizer, _tiktoken
from phi3_jax.tokenizer._tiktoken import byte_level_tokenizer, find_merges, read_ranks

FILE = "cl100k_base.tiktoken"
# As in the checkpoint: the class is in a file of Microsoft's.
CONFIG = {
    "auto_map": {"AutoTokenizer": ["tokenization_phi3_small.Phi3SmallTokenizer", None]},
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "model_max_length": 8192,
    "tokenizer_class": "Phi3SmallTokenizer",
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
# Marks, words, numbers, letters that change oddly with their case, scripts with and without spaces, emoji.
WORDS = """
<|user|> <|end|> <|endoftext|> <|dummy_id_2|> <|dummy_id_86|> <|dummy_id_87|> <| |>
the The dog don't we'RE I'M 'll it'\u017f _ a_b ... !! // :// =========
1 12345 1.5e-3 \u0661\u0662\u0663 \u2167 \xbd
\xe9 e\u0301 \ufb00 \xdf \u0130 \u212a \ufeff \ufffd \U0010ffff
漢字 日本語の文 ไทย हिन्दी العربية Привет 안녕 \U0001d518\U0001d52b 😀 👩\u200d👩\u200d👧 🇩🇪
"""
FRAGMENTS = [*WORDS.split(), *" \n\t\xa0\u3000\u2028\x85\x1c\x00\u200b", "  ", "    ", "\n\n", "\r\n"]
TEXTS = [
    "",
    "\n  ",
    " \n \t\n   ",
    "a" * 300,
    " " * 200,
    "Hello, world!",
    "<|user|>\nHi<|end|>\n<|assistant|>\n",
]


def texts(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    mixed = ["".join(generator.choices(FRAGMENTS, k=generator.randint(1, 12))) for _ in range(count)]
    code_points = [*range(0xD800), *range(0xE000, 0x110000)]
    odd = ["".join(map(chr, generator.choices(code_points, k=8))) for _ in range(count // 4)]
    return [*TEXTS, *FRAGMENTS, *mixed, *odd]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of the checkpoint, with ranks of our own."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / FILE).write_bytes(rank_file(sized_tokens()))
    write_json(folder / "tokenizer_config.json", CONFIG)
    return folder


@pytest.fixture(scope="module")
def backend(folder: Path) -> JsonBackend:
    return Phi3Tokenizer.from_pretrained(folder).backend


@pytest.fixture
def tokenizer(backend: JsonBackend) -> Phi3Tokenizer:
    """The tokenizer of `folder`, which takes a second to build."""
    return Phi3Tokenizer(backend, _tiktoken.merge_config(CONFIG))


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("saved")
    Phi3Tokenizer.from_pretrained(folder).save_pretrained(saved)
    return saved


# --- ids and texts


def test_ids_and_texts_match_tiktoken(tokenizer):
    theirs, given = TheirRanks(sized_tokens()), texts(1, 200)
    expected = theirs.encode(given)
    assert [tokenizer.encode(text) for text in given] == expected
    assert tokenizer.encode_batch(given) == expected
    for text, ids in zip(given, expected, strict=True):
        assert tokenizer.decode(ids) == text
        kept = [i for i in ids if i < SPECIAL["<|endoftext|>"]]
        assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(kept)
    generator = random.Random(2)
    rows = [generator.choices(range(RANKS + 96), k=12) for _ in range(50)]
    rows += [generator.choices(range(256), k=12) for _ in range(50)]
    assert tokenizer.batch_decode(rows) == theirs.decode(rows)


def test_unusual_ranks_match_tiktoken():
    """Tokens may have lower ranks than their parts, or no parts at all; pairs overlap."""
    generator = random.Random(4)
    unmerged = 0
    for _ in range(30):
        words = {"".join(generator.choices("ab", k=generator.randint(2, 6))) for _ in range(18)}
        tokens = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in sorted(words))]
        generator.shuffle(tokens)
        given = ["".join(generator.choices("ab", k=generator.randint(1, 30))) for _ in range(40)]
        tokenizer = byte_level_tokenizer(tokens)
        expected = TheirRanks(tokens, {}).encode(given)
        assert [tokenizer.encode(text).ids for text in given] == expected
        unmerged += len(words) - len(find_merges(tokens))
    assert unmerged > 30


def test_real_ranks_match_tiktoken(shared_data, tmp_path):
    path = shared_data("cl100k", FILE)
    tokens = read_ranks(path.read_bytes(), FILE)
    assert len(find_merges(tokens)) == RANKS - 256
    shutil.copyfile(path, tmp_path / FILE)
    tokenizer, theirs, given = Phi3Tokenizer.from_pretrained(tmp_path), TheirRanks(tokens), texts(5, 300)
    assert [tokenizer.encode(text) for text in given] == theirs.encode(given)
    novel = shared_data("long_text", "war_and_peace.txt").read_text(encoding="utf-8")[:200_000]
    ids = tokenizer.encode(novel)
    assert ids_digest(ids) == theirs.digest(novel)
    assert tokenizer.decode(ids) == novel
    prompt = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert tokenizer.encode(prompt) == [100262, 198, 13347, 100266, 198, 100263, 198]


def test_streams_the_text_of_any_ids(tokenizer):
    generator = random.Random(3)
    for skip in (False, True):
        ids = generator.choices([*range(300), *range(RANKS - 50, RANKS + 100)], k=400)
        ids += tokenizer.encode("漢字 <|end|>😀")
        decoder = tokenizer.stream(skip_special_tokens=skip)
        parts = [decoder.put(i) for i in ids]
        assert "".join(parts) + decoder.end() == tokenizer.decode(ids, skip_special_tokens=skip)


# --- special tokens


def test_special_tokens_are_microsofts(tokenizer):
    assert tokenizer.get_added_vocab() == SPECIAL
    assert (len(tokenizer), tokenizer.vocab_size) == (RANKS + 96, RANKS)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 100_257
    assert (tokenizer.unk_token, tokenizer.model_max_length) == (None, 8192)
    assert tokenizer.backend.special_ids == frozenset(range(RANKS + 1, RANKS + 96))
    every = range(RANKS, RANKS + 97)
    assert tokenizer.decode(every) == "".join(sorted(SPECIAL, key=SPECIAL.__getitem__))
    assert tokenizer.decode(every, skip_special_tokens=True) == "<|dummy_id_2|>"
    strangers = tokenizer.encode("<|system|>", split_special_tokens=True)
    assert tokenizer.decode(strangers) == "<|system|>"
    assert max(strangers) < RANKS


def test_pads_on_the_left_and_adds_nothing(tokenizer):
    batch = tokenizer(["dog", "the dog and the dog"])
    dog = tokenizer.encode("dog")
    padding = batch.input_ids.shape[1] - len(dog)
    assert batch.input_ids[0].tolist() == [100_257] * padding + dog
    assert batch.attention_mask[0].tolist() == [0] * padding + [1] * len(dog)
    assert tokenizer.num_special_tokens_to_add() == tokenizer.num_special_tokens_to_add(pair=True) == 0
    assert tokenizer.decode(batch.input_ids[1]) == "the dog and the dog"
    right = tokenizer(["dog", "the dog and the dog"], padding_side="right")
    assert right.input_ids[0, -1] == 100_257


def test_config_wins_over_the_class(backend):
    given = {"pad_token": "<|dummy_id_0|>", "padding_side": "right", "eos_token": None}
    given["added_tokens_decoder"] = {
        "100264": {"content": "<|dummy_id_0|>", "special": False, "rstrip": True}
    }
    tokenizer = Phi3Tokenizer(backend, _tiktoken.merge_config(given))
    assert (tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.eos_token_id) == (
        100_264,
        "right",
        100_257,
    )
    assert not tokenizer.added_tokens_decoder[100_264].rstrip
    assert tokenizer.added_tokens_decoder[100_264].special


# --- chats


def test_template_of_the_class_begins_with_bos(tokenizer):
    text = "<|endoftext|><|system|>\nBe brief.<|end|>\n<|user|>\nHi\n<|end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text + "<|endoftext|>"
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert prompt == tokenizer.encode(text + "<|assistant|>\n")
    assert prompt[:2] == [100_257, 100_261]


def test_template_of_the_config_wins(backend):
    config = _tiktoken.merge_config(CONFIG | {"chat_template": "{{ messages[1].content }}{{ bos_token }}"})
    assert Phi3Tokenizer(backend, config).apply_chat_template(CHAT, tokenize=False) == "Hi\n<|endoftext|>"


# --- files


def test_save_writes_a_tokenizer_json_beside_the_ranks(folder, saved, tokenizer):
    assert sorted(path.name for path in saved.iterdir()) == [FILE, "tokenizer.json", "tokenizer_config.json"]
    assert (saved / FILE).read_bytes() == (folder / FILE).read_bytes()
    config = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config
    again = Phi3Tokenizer.from_pretrained(saved)
    for text in texts(6, 20):
        assert again.encode(text) == tokenizer.encode(text)
    for name in ("padding_side", "model_max_length", "special_tokens_map", "added_tokens_decoder"):
        assert repr(getattr(again, name)) == repr(getattr(tokenizer, name)), name
    assert again.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)


def test_save_keeps_changes(folder, tmp_path):
    tokenizer = Phi3Tokenizer.from_pretrained(folder, padding_side="right")
    assert tokenizer.add_tokens([AddedToken("<tool>", normalized=False)]) == 1
    tokenizer.pad_token = "<|dummy_id_5|>"
    tokenizer.chat_template = "{{ 'mine' }}"
    tokenizer.save_pretrained(tmp_path)
    again = Phi3Tokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.pad_token_id) == ("right", SPECIAL["<|dummy_id_5|>"])
    assert again.encode("a<tool>")[1:] == [RANKS + 96]
    assert again.apply_chat_template(CHAT, tokenize=False) == "mine"


@pytest.mark.parametrize("side", ["left", "right"])
def test_saved_folder_matches_transformers(saved, side):
    sides = {"padding_side": side, "truncation_side": side}
    theirs = TheirTokenizer("ranks", saved, **sides)
    ours = Phi3Tokenizer.from_pretrained(saved, **sides)
    given = [text for text in [*FRAGMENTS, *texts(7, 30)] if text]
    for text, expected in zip(given, theirs.ask("__call__", given, return_offsets_mapping=True), strict=True):
        batch = ours(text, return_offsets_mapping=True)
        assert batch.input_ids[0].tolist() == expected["input_ids"], text
        assert batch["offset_mapping"][0].tolist() == expected["offset_mapping"], text
        assert batch.word_ids() == expected["word_ids"], text
    asked = {"padding": True, "truncation": True, "max_length": 6}
    (expected,) = theirs.ask("__call__", [given[:40]], return_tensors="np", **asked)
    batch = ours(given[:40], **asked)
    for name in ("input_ids", "attention_mask"):
        assert batch[name].tolist() == expected[name]
    words = ["the", "quick<|end|> a", "漢字", "don't"]
    options = {"is_split_into_words": True, "return_offsets_mapping": True}
    (expected,) = theirs.ask("__call__", [words], **options)
    batch = ours(words, **options)
    assert batch.word_ids() == expected["word_ids"]
    assert np.array_equal(batch["offset_mapping"][0], expected["offset_mapping"])
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "padding_side", "model_max_length")
    attributes = theirs.attributes(*names)
    assert attributes.pop("length") == len(ours)
    assert attributes == {name: getattr(ours, name) for name in names}


# --- broken files

BYTES = rank_file([bytes([byte]) for byte in range(256)])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "line 1: expected a token in base64, .* b'version http",
        ),
        (BYTES + b"YQ= 256\n", "line 257: expected a token in base64, a space and its rank, got b'YQ= 256'"),
        (BYTES + b"YWI=256\n", "line 257: expected a token"),
        (BYTES + b"YWI= 2x6\n", "line 257: expected a token"),
        (BYTES + b"YWI= -256\n", "line 257: expected a token"),
        (BYTES + b"YWI= 2 256\n", "line 257: expected a token"),
        (BYTES + b"YW*I= 256\n", "line 257: expected a token"),
        (BYTES + b"==== 256\n", "line 257: expected a token"),
        (BYTES + b"YWI= 255\n", "line 257: the rank 255 occurs twice"),
        (BYTES + b"AA== 0\n", "line 257: the rank 0 occurs twice"),
        (BYTES + b"YWI= 257\n", "has the rank 257, but not 256"),
        (BYTES + b"QQ== 256\n", "the ranks 65 and 256 have the same token b'A'"),
        (BYTES + b"YWFh" * 43 + b" 256\n", "line 257: the token has 129 bytes; at most 128 are accepted"),
        (BYTES.replace(b"gA== 128\n", b"YWI= 128\n"), "has no token for the byte 0x80"),
        (BYTES + b"YWI= 256\n", r"has 257 ranks; expected 100,256, .*it may be cut short"),
        (b"", "has no ranks; download it again"),
    ],
)
def test_rejects_a_broken_file(tmp_path, content, says):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{FILE}.*{says}"):
        Phi3Tokenizer.from_pretrained(tmp_path)


def test_rejects_a_cut_or_longer_file(folder, tmp_path):
    content = (folder / FILE).read_bytes()
    for broken, says in (
        (content[:-30], "expected a token|expected 100,256|occurs twice"),
        (content + b"%s %d\n" % (b"YWJjZGVm" * 3, RANKS), "it is the vocabulary of another model"),
    ):
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(UserError, match=says):
            Phi3Tokenizer.from_pretrained(tmp_path)


def test_lines_may_end_as_on_windows(tmp_path):
    content = BYTES.replace(b"\n", b"\r\n") + b"\r\n" + b"YWI= 256"
    assert read_ranks(content, FILE)[-1] == b"ab"
