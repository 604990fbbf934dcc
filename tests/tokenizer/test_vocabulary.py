"""Calls, added tokens, roles and padding have transformers' arguments, names and results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from small_tokenizers import ADDED, config_of, reference, write_json
from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import JsonBackend, Phi3Tokenizer, SentencePieceBackend

TEXTS = [
    "the quick brown fox",
    "  two <tool> é😀\n\t漢字 dog",
    "",
    "<|end|> \n a<|user|>  ",
    "▁ <s>x",
    " a  b",
]
PAIRS = ["a dog", "x", "the lazy", "", "y", "z"]
WORDS = [["the", "quick<|end|> a", "é", "b"], ["dog", " fox ", "don't"]]


@pytest.fixture(params=["model", "json"])
def tokenizer(request: pytest.FixtureRequest, piece_folders: Any) -> Phi3Tokenizer:
    return Phi3Tokenizer.from_pretrained(getattr(piece_folders, request.param))


# --- calls


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncation": True, "max_length": 6},
        {"text_pair": PAIRS, "truncation": True, "max_length": 9},
        {"padding_side": "right", "pad_to_multiple_of": 8},
        {"padding_side": "left", "return_attention_mask": False},
    ],
)
def test_offsets_and_masks_match_transformers(piece_folders, tokenizer, side, options):
    sides = {"padding_side": side, "truncation_side": side}
    wanted = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_length": True}
    theirs = reference("pieces", piece_folders.json, **sides)
    asked = {"padding": True, "return_tensors": "np", **wanted, **options}
    (expected,) = theirs.ask("__call__", [TEXTS], **asked)
    tokenizer.padding_side = tokenizer.truncation_side = side
    ours = tokenizer(TEXTS, return_tensors="np", **wanted, **options)
    expected.pop("word_ids")
    assert sorted(ours) == sorted(expected)
    for name, array in ours.items():
        assert (array.dtype, array.tolist()) == (np.int32, expected[name]), name


def test_offsets_of_bytes_match_transformers(byte_level_folder):
    """The splitter of GPT-2 leaves the space out of offsets; an emoji of several tokens is one character."""
    theirs, ours = reference("bytes", byte_level_folder), Phi3Tokenizer.from_pretrained(byte_level_folder)
    given = [text for text in TEXTS if text]
    for text, expected in zip(given, theirs.ask("__call__", given, return_offsets_mapping=True), strict=True):
        batch = ours(text, return_offsets_mapping=True)
        assert batch["offset_mapping"][0].tolist() == expected["offset_mapping"]
        assert batch.word_ids() == expected["word_ids"]
        first = next(i for i, each in enumerate(expected["offset_mapping"]) if each[1] > each[0])
        start, _ = batch.token_to_chars(0, first)
        assert batch.char_to_token(0, start) == first
        assert batch.char_to_token(0, len(text)) is None


@pytest.mark.parametrize("kind", ["model", "json", "bytes"])
def test_words_match_transformers(piece_folders, byte_level_folder, kind):
    folder = byte_level_folder if kind == "bytes" else getattr(piece_folders, kind)
    theirs = reference("bytes", folder) if kind == "bytes" else reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(folder)
    options = {"is_split_into_words": True, "return_offsets_mapping": True}
    for words, expected in zip(WORDS, theirs.ask("__call__", WORDS, **options), strict=True):
        batch = ours(words, **options)
        assert batch.word_ids() == expected["word_ids"]
        assert batch.input_ids[0].tolist() == expected["input_ids"]
        assert batch["offset_mapping"][0].tolist() == expected["offset_mapping"]
    batch = ours(WORDS, is_split_into_words=True, padding_side="left")
    assert batch.word_ids(1)[-1] == 2
    assert batch.word_ids(1)[0] is None
    assert batch.sequence_ids(1) == [None if word is None else 0 for word in batch.word_ids(1)]
    assert batch.tokens(0)[-1] == ours.convert_ids_to_tokens(int(batch.input_ids[0, -1]))


@pytest.mark.parametrize("kind", ["model", "json", "bytes"])
def test_splits_special_tokens_as_transformers(piece_folders, byte_level_folder, kind):
    """Other added tokens stay whole; those around the text do too."""
    folder = byte_level_folder if kind == "bytes" else getattr(piece_folders, kind)
    theirs = reference("bytes", folder) if kind == "bytes" else reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(folder)
    given = ["a<|end|> b<tool>s <s>", "<|im_start|>user", "<left>", *TEXTS]
    expected = theirs.ask("encode", given, split_special_tokens=True)
    assert [ours.encode(text, split_special_tokens=True) for text in given] == expected
    assert expected != [ours.encode(text) for text in given]
    assert ours(given[0], split_special_tokens=True).input_ids[0].tolist() == expected[0]
    ours.add_tokens(["<new>"], special_tokens=True)
    new = ours.convert_tokens_to_ids("<new>")
    assert new in ours.encode("a <new>")
    assert new not in ours.encode("a <new>", split_special_tokens=True)


def test_offsets_need_a_model_that_leaves_texts_as_they_are(piece_folders):
    content = (piece_folders.model / "tokenizer.model").read_bytes()
    backend = SentencePieceBackend(content)
    with pytest.raises(UserError, match=r"tokenizer\.model changes texts before it splits them"):
        backend._offsets("longer than its pieces", backend.encode("longer"))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: t("a", stride=2), ValueError, "stride=2 is not supported; cut long texts"),
        (lambda t: t("a", return_overflowing_tokens=True), ValueError, "return_overflowing_tokens=True"),
        (lambda t: t("a", text_target="b"), ValueError, "pass its input_ids as labels"),
        (lambda t: t("a", return_token_type_ids=True), ValueError, "no token types"),
        (lambda t: t("a", max_len=3), TypeError, "did you mean 'max_length'"),
        (lambda t: t("a", return_tensors="tf"), ValueError, "return_tensors='tf' is not supported"),
        (lambda t: t(["a", 3]), TypeError, "expected a text"),
        (lambda t: t("a b", is_split_into_words=True), TypeError, "must be a str or a list|list of words"),
        (lambda t: t([["a"], "b"], is_split_into_words=True), TypeError, "list of words"),
        (lambda t: t([["a", "b"]]), TypeError, "expected a text"),
        (lambda t: t.encode("a", None, False, stride=1), ValueError, "encode: stride=1"),
        (lambda t: t.encode("a", trunction=True), TypeError, "did you mean 'truncation'"),
        (lambda t: t.encode("a", False), TypeError, "text_pair must be a str"),
        (lambda t: t.decode([5], clean_up_tokenization_spaces=True), ValueError, "decoded as they are"),
        (
            lambda t: t.batch_decode([[5]], skip_special_token=True),
            TypeError,
            "did you mean 'skip_special_to",
        ),
        (lambda t: t.pad({"labels": [[1]]}), ValueError, "pad needs input_ids, got labels"),
        (lambda t: t.pad([{"input_ids": [1]}, {"ids": [1]}]), ValueError, "row 1 has the entries"),
        (
            lambda t: t.pad({"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]]}),
            ValueError,
            "labels with -100",
        ),
        (lambda t: t.pad([]), ValueError, "at least one row"),
        (lambda t: t.pad({"input_ids": [[1]]}, pading=True), TypeError, "did you mean 'padding'"),
        (lambda t: t.pad({"input_ids": [[1]]}).word_ids(0), ValueError, "were not made from texts"),
    ],
)
def test_rejects_arguments_that_are_not_supported(tokenizer, call, error, says):
    with pytest.raises(error, match=says):
        call(tokenizer)


def test_accepts_arguments_of_transformers_without_effect(tokenizer):
    neutral = {"stride": 0, "return_token_type_ids": False, "verbose": False, "text_target": None}
    assert tokenizer("the dog", **neutral).input_ids.tolist() == [tokenizer.encode("the dog")]
    ids = tokenizer.encode("the dog", verbose=True)
    assert tokenizer.decode(token_ids=ids, clean_up_tokenization_spaces=False) == "the dog"


@pytest.mark.parametrize(
    "options", [{"truncation": True, "max_length": 3}, {"padding": "max_length", "max_length": 40}, {}]
)
@pytest.mark.parametrize("pair", [None, "dog"])
def test_encode_matches_transformers(piece_folders, tokenizer, options, pair):
    theirs = reference("pieces", piece_folders.json, padding_side="left")
    (expected,) = theirs.ask("encode", [("the quick brown fox", pair)], **options)
    tokenizer.padding_side = "left"
    assert tokenizer.encode("the quick brown fox", pair, **options) == expected
    array = tokenizer.encode("the quick brown fox", pair, return_tensors="np", **options)
    assert (array.dtype, array.tolist()) == (np.int32, [expected])


# --- padding


ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "token_type_ids": [1, 1, 1], "special_tokens_mask": [0, 0, 1], "label": 3},
    {"input_ids": [8], "token_type_ids": [1], "special_tokens_mask": [0], "label": 4},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "max_length", "max_length": 6},
        {"pad_to_multiple_of": 4},
        {"return_attention_mask": False},
    ],
)
def test_pad_matches_transformers(piece_folders, tokenizer, side, options):
    theirs = reference("pieces", piece_folders.json, padding_side=side)
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    (expected,) = theirs.ask("pad", [columns], return_tensors="np", **options)
    expected.pop("word_ids")
    tokenizer.padding_side = side
    for given in (ROWS, columns, {name: list(map(np.array, rows)) for name, rows in columns.items()}):
        padded = tokenizer.pad(given, **options)
        assert {name: array.tolist() for name, array in padded.items()} == expected
    alone = tokenizer.pad({"input_ids": [5, 6]}, padding="max_length", max_length=3, padding_side="right")
    assert alone.input_ids.tolist() == [[5, 6, tokenizer.pad_token_id]]


# --- added tokens and roles


ADDITIONS: list[tuple[str, tuple[Any, ...]]] = [
    ("add_tokens", ("<new>",)),
    ("add_tokens", (["<new>", "<new>", "", "<|end|>", "the", "<other>"],)),
    ("add_tokens", (["<special>"], True)),
    ("add_special_tokens", ({"pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"]},)),
    ("add_special_tokens", ({"extra_special_tokens": ["<z>"]}, False)),
    ("add_special_tokens", ({"sep_token": "<s>", "cls_token": "<special>"},)),
]
NAMES = ("special_tokens_map", "all_special_tokens", "all_special_ids", "extra_special_tokens", "vocab_size")
PROBE = "a <new>the <pad>  <x> <special><|end|> b<other>"


class Files:
    """A folder whose answers are stored under a name."""

    def __init__(self, name: str, folder: Path):
        self.answer_key, self.folder = name, folder


@stored
def their_additions(files: Files) -> list[Any]:
    """Returns what transformers' tokenizer is after each addition."""
    import transformers

    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(files.folder)
    return [state(theirs, getattr(theirs, method)(*arguments)) for method, arguments in ADDITIONS]


def state(tokenizer: Any, number: int | None) -> dict[str, Any]:
    ids = tokenizer.encode(PROBE)
    return {name: getattr(tokenizer, name) for name in NAMES} | {
        "number": number,
        "length": len(tokenizer),
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added": sorted(tokenizer.get_added_vocab().items()),
        "pad": (tokenizer.pad_token, tokenizer.pad_token_id),
    }


@pytest.mark.parametrize("kind", ["model", "json", "bytes"])
def test_added_tokens_match_transformers(piece_folders, byte_level_folder, tmp_path, kind):
    folder = byte_level_folder if kind == "bytes" else getattr(piece_folders, kind)
    compared = byte_level_folder if kind == "bytes" else piece_folders.json
    expected = their_additions(Files("bytes" if kind == "bytes" else "pieces", compared))
    ours = Phi3Tokenizer.from_pretrained(folder)
    found = [state(ours, getattr(ours, method)(*arguments)) for method, arguments in ADDITIONS]
    for (method, arguments), mine, theirs in zip(ADDITIONS, found, expected, strict=True):
        theirs["vocabulary"], theirs["added"] = map(list, (theirs["vocabulary"], theirs["added"]))
        # In text cut by SentencePiece, added tokens are cut out as they are written.
        for name in mine.keys() - ({"ids", "text"} if kind == "model" else set()):
            plain = (
                [tuple(each) for each in theirs[name]] if name in ("vocabulary", "added") else theirs[name]
            )
            plain = tuple(plain) if name == "pad" else plain
            assert mine[name] == plain, (method, arguments, name)
    ours.save_pretrained(tmp_path)
    again = Phi3Tokenizer.from_pretrained(tmp_path)
    assert state(again, None) == state(ours, None)
    new = ours.convert_tokens_to_ids("<new>")
    assert new in ours.encode("a <new>the")


@stored
def their_saved_state(files: Files) -> dict[str, Any]:
    import transformers

    return state(transformers.PreTrainedTokenizerFast.from_pretrained(files.folder), None)


def test_saved_additions_load_in_transformers(piece_folders, tmp_path):
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    for method, arguments in ADDITIONS:
        getattr(ours, method)(*arguments)
    ours.save_pretrained(tmp_path)
    theirs = their_saved_state(Files("saved additions", tmp_path))
    for name in ("ids", "text", "length", "special_tokens_map", "all_special_ids"):
        assert theirs[name] == state(ours, None)[name], name


def test_roles_can_be_set(tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    tokenizer.unk_token_id = 1
    assert tokenizer.unk_token == "<s>"
    tokenizer.sep_token = AddedToken("<tool>")
    tokenizer.save_pretrained(tmp_path)
    again = Phi3Tokenizer.from_pretrained(tmp_path)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<s>",
        "sep_token": "<tool>",
        "pad_token": "</s>",
    }
    tokenizer.pad_token = None
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (None, None)
    with pytest.raises(UserError, match=r"add it with add_special_tokens\({'pad_token': '<pad>'}\)"):
        tokenizer.pad_token = "<pad>"
    with pytest.raises(UserError, match="pad_token_id=9999 has no token"):
        tokenizer.pad_token_id = 9999


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: t.add_tokens([3]), TypeError, "must be str or AddedToken, got int"),
        (
            lambda t: t.add_special_tokens({"end_token": "<e>"}),
            ValueError,
            "no special token is called 'end_to",
        ),
        (lambda t: t.add_special_tokens({"extra_special_tokens": "<e>"}), ValueError, "must be a list"),
    ],
)
def test_rejects_tokens_that_cannot_be_added(tokenizer, call, error, says):
    with pytest.raises(error, match=says):
        call(tokenizer)


def test_panic_of_the_library_is_an_error(piece_folders, monkeypatch):
    """The library's panics are no `Exception`."""
    panic = type("PanicException", (BaseException,), {})

    class Panics:
        def __getattr__(self, name: str) -> Any:
            def method(*_: Any, **__: Any) -> None:
                raise panic("index out of bounds")

            return method

    backend = JsonBackend((piece_folders.json / "tokenizer.json").read_bytes(), "here/tokenizer.json")
    backend._tokenizer = Panics()
    for use in (lambda: backend.encode("a"), lambda: backend.pieces("a"), lambda: backend.decode([1])):
        with pytest.raises(
            UserError, match=r"here/tokenizer\.json breaks the library .*: index out of bounds"
        ):
            use()


def test_flags_of_added_tokens_are_kept(tmp_path, piece_folders):
    """Flags of the config reach the files that are saved."""
    write_json(tmp_path / "tokenizer_config.json", config_of(len(piece_folders.pieces)))
    (tmp_path / "tokenizer.json").write_bytes((piece_folders.json / "tokenizer.json").read_bytes())
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(AddedToken("<strips>", lstrip=True, normalized=False))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = Phi3Tokenizer.from_pretrained(tmp_path / "saved").added_tokens_decoder
    assert {i: repr(token) for i, token in again.items()} == {
        i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()
    }
    assert again[len(piece_folders.pieces) + len(ADDED)].lstrip


# --- loading


def test_from_pretrained_takes_roles_and_a_template(piece_folders):
    tokenizer = Phi3Tokenizer.from_pretrained(
        piece_folders.json,
        pad_token="<pad>",
        eos_token="<tool>",
        unk_token=None,
        additional_special_tokens=["<x>"],
        chat_template="{{ messages[0].content }}",
        use_fast=True,
        trust_remote_code=True,
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token, tokenizer.unk_token) == (408, "<tool>", "<unk>")
    assert tokenizer.extra_special_tokens == ["<x>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"subfolder": "tokenizer"}, ValueError, "subfolder='tokenizer' is not supported"),
        ({"add_bos_token": True}, ValueError, "the files decide it"),
        ({"pading_side": "left"}, TypeError, "did you mean 'padding_side'"),
        ({"gguf_file": "a.gguf"}, ValueError, "give the path of the file itself"),
    ],
)
def test_from_pretrained_rejects_what_it_would_ignore(piece_folders, options, error, says):
    with pytest.raises(error, match=says):
        Phi3Tokenizer.from_pretrained(piece_folders.json, **options)


# --- Phi-3's own vocabulary


def test_offsets_of_phi3_are_the_same_in_both_back_ends(shared_data):
    """The library `tokenizers`, which transformers uses, gives those of tokenizer.json."""
    vectors = json.loads(shared_data("phi3-tokenizer", "vectors.json").read_text(encoding="utf-8"))
    by_json = Phi3Tokenizer.from_pretrained(shared_data("phi3-tokenizer", "phi-3-mini"))
    by_model = Phi3Tokenizer.from_pretrained(shared_data("phi3-tokenizer", "sentencepiece"))
    for text in [vector["text"] for vector in vectors] + [
        vector["text"] * 2 + "<|end|> \n" for vector in vectors
    ]:
        expected, found = by_json.backend.pieces(text), by_model.backend.pieces(text)
        assert found == expected, text
        words = text.split(" ")
        assert by_model.backend.pieces(words) == by_json.backend.pieces(words), text
