"""Tests stopping criteria against transformers 5.23, on small vocabularies of bytes and of pieces."""

import random
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from answers import stored
from small_tokenizers import train_pieces
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phi3_jax.generation.stopping import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from phi3_jax.tokenizer import JsonBackend, Phi3Tokenizer, SentencePieceBackend

TEXT = "the stopper stops, a stop is at the top.\n\nUser: été 漢字 😀 stop\n```\n  two  spaces  "
STOPS = [
    "stop",
    " stop",
    "p",
    "\n",
    "\n\n",
    "User:",
    "é",
    "été",
    "漢字",
    "😀",
    "```",
    " ",
    "  ",
    "s, a",
    "<|end|>",
]
FRAGMENTS = [*STOPS, "st", "op", "opera", "top", "\xa0", "😁", "漢", "a ", "<s>"]


def sentence_pieces() -> bytes:
    return train_pieces([TEXT.replace("漢字 😀", "")] * 4, 310)


def transformers_tokenizer(content: bytes) -> Tokenizer:
    """Returns a tokenizer of the same pieces, as transformers converts it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|end|>"])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_tokens(["<tool>", "漢字 tool"])
    return tokenizer


def word_pieces() -> Tokenizer:
    """Returns a tokenizer whose decoder is not known token by token."""
    words = [
        "[UNK]",
        "a",
        "abcdef",
        "st",
        "##op",
        "stop",
        "##per",
        "the",
        "##s",
        "##top",
        ".",
        "!",
        "op",
        "<|end|>",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


class Vocabulary:
    """A tokenizer for the reference; its name and ids identify it in stored answers."""

    def __init__(self, name: str, tokenizer: Tokenizer):
        self.answer_key = name
        self.tokenizer = tokenizer


@pytest.fixture(scope="module", params=["bytes", "pieces", "model", "words"])
def pair(request: pytest.FixtureRequest) -> tuple[Phi3Tokenizer, Vocabulary]:
    """Our tokenizer and the reference's of the same vocabulary."""
    if request.param in ("pieces", "model"):
        content = sentence_pieces()
        theirs = transformers_tokenizer(content)
        ours: Any = JsonBackend(theirs.to_str())
        if request.param == "model":
            ours = SentencePieceBackend(content)
            ours.add_tokens({theirs.token_to_id("<|end|>"): theirs.get_added_tokens_decoder()[len(ours)]})
    else:
        theirs = {"bytes": byte_level, "words": word_pieces}[request.param]()
        ours = JsonBackend(theirs.to_str())
    return Phi3Tokenizer(ours), Vocabulary(request.param, theirs)


@stored
def theirs_stopped(vocabulary: Vocabulary, stops: list[str], texts: list[list[list[int]]]) -> Any:
    """Returns whether the reference stops after each row of `texts`, as bits; None if it rejects `stops`."""
    import torch
    from transformers import PreTrainedTokenizerFast
    from transformers import StopStringCriteria as TheirStopStrings

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer)
    try:
        criterion = TheirStopStrings(tokenizer, stops)
    except ValueError:
        return None
    stopped = [bool(each) for rows in texts for each in criterion(torch.tensor(rows), None)]
    return np.packbits(stopped)


def assert_stops_as_theirs(
    tokenizer: Phi3Tokenizer, vocabulary: Vocabulary, stops: list[str], texts: list[list[list[int]]]
) -> None:
    """Checks that both stop after the same rows; if the reference rejects `stops`, ours never stops."""
    criterion, expected = StopStringCriteria(tokenizer, stops), theirs_stopped(vocabulary, stops, texts)
    if expected is None:
        assert len(tokenizer) < 20, "only the smallest vocabulary lacks such characters"
    rest = iter(np.unpackbits(expected).astype(bool).tolist() if expected is not None else ())
    for rows in texts:
        expected_rows = [next(rest, False) for _ in rows]
        assert criterion(np.array(rows), None).tolist() == expected_rows, tokenizer.convert_ids_to_tokens(
            rows[0]
        )


def ids_of(tokenizer: Phi3Tokenizer, kind: int, generator: random.Random) -> list[int]:
    """Returns random ids: of any tokens, of joined words, or of single characters."""
    if kind == 0:
        return generator.choices(range(len(tokenizer)), k=30)
    text = "".join(generator.choices(FRAGMENTS, k=8))
    if kind == 1:
        return tokenizer.encode(text, add_special_tokens=False)[:40]
    pieces = [tokenizer.encode(letter, add_special_tokens=False)[-2:] for letter in text[:20]]
    return [token for piece in pieces for token in piece]


@pytest.mark.parametrize("stops", [*[[text] for text in STOPS], STOPS[:3], STOPS[6:10]], ids=repr)
def test_stop_strings_match_transformers(pair: tuple[Phi3Tokenizer, Vocabulary], stops: list[str]) -> None:
    generator, texts = random.Random(0), []
    for kind in (0, 0, 1, 1, 1, 2, 2):
        ids = ids_of(pair[0], kind, generator)
        texts += [
            [ids[:length], [0] * (length // 2) + ids[: length - length // 2]]
            for length in range(1, len(ids) + 1)
        ]
    assert_stops_as_theirs(*pair, stops, texts)


@pytest.mark.parametrize(
    "split", [["stop"], ["st", "op"], ["s", "to", "pp"], ["st", "opera"], ["las", "topper"]]
)
def test_borders(split: list[str]) -> None:
    tokenizer = Phi3Tokenizer(byte_level_of(*split, "ation", "x"))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in split]
    last = tokenizer.convert_tokens_to_ids("ation")
    criterion = StopStringCriteria(tokenizer, "stop")
    done = [bool(criterion(np.array([ids[:count]]), None)[0]) for count in range(1, len(ids) + 1)]
    assert done == [False] * (len(ids) - 1) + [True]
    assert not criterion(np.array([[*ids, last]]), None)[0], "complete before the latest token"
    before = tokenizer.convert_tokens_to_ids("x")
    assert criterion(np.array([[last, before, *ids]]), None)[0]
    if len(ids) > 1:
        assert not criterion(np.array([[*ids[:-1], before, ids[-1]]]), None)[0]


def byte_level_of(*tokens: str) -> JsonBackend:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(dict.fromkeys([*tokens, "a"]))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return JsonBackend(tokenizer.to_str())


def test_characters_of_several_tokens() -> None:
    tokenizer = Phi3Tokenizer(JsonBackend(byte_level().to_str()))
    ids = tokenizer.encode("x😁")
    assert len(ids) > 2
    criterion = StopStringCriteria(tokenizer, ["😁"])
    assert [bool(criterion(np.array([ids[:n]]))[0]) for n in range(1, len(ids) + 1)] == [False] * (
        len(ids) - 1
    ) + [True]
    assert not StopStringCriteria(tokenizer, ["😀"])(np.array([ids]))[0]


def test_cost_does_not_grow_with_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Phi3Tokenizer(byte_level_of("b", "c"))
    criterion = StopStringCriteria(tokenizer, ["bcbc", "bb"])
    reads = []

    class Row(np.ndarray):
        def __getitem__(self, index: Any) -> Any:
            reads.append(index)
            return super().__getitem__(index)

    row = np.zeros(5000, int).view(Row)
    assert criterion.completed(row) is True
    assert len(reads) == 4
    assert StopStringCriteria(tokenizer, "b")(np.zeros((3, 0), int)).tolist() == [False] * 3


def test_ids_without_a_token() -> None:
    tokenizer = Phi3Tokenizer(byte_level_of("b", "c"))
    criterion = StopStringCriteria(tokenizer, "bc")
    rows = np.array([[0, 99, 1], [0, 1, 99], [99, 0, 1], [0, -1, 1]])
    assert criterion(rows).tolist() == [True, False, True, True], (
        "ids without a token have no text, as in decode"
    )


@pytest.mark.parametrize(
    ("stops", "error", "message"),
    [
        ([], ValueError, "stop_strings is empty"),
        ("", ValueError, "holds an empty text"),
        (["a", ""], ValueError, "holds an empty text"),
        (["a", 5], TypeError, "holds int 5; expected texts"),
        (["\ud800"], ValueError, "not valid Unicode"),
    ],
)
def test_rejects_other_stop_strings(stops: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StopStringCriteria(Phi3Tokenizer(byte_level_of("b")), stops)


def test_the_real_tokenizers(shared_data: Any) -> None:
    folder = shared_data("phi3-tokenizer", "phi-3-mini")
    ours = Phi3Tokenizer.from_pretrained(folder)
    theirs = Vocabulary("phi-3-mini", Tokenizer.from_file(str(folder / "tokenizer.json")))
    generator = random.Random(1)
    for stops in (["stop"], ["\n"], [" the"], ["<|end|>", "é"]):
        texts = []
        for kind in (0, 1, 2):
            ids = ids_of(ours, kind, generator)
            texts += [[ids[:length]] for length in range(1, len(ids) + 1)]
        assert_stops_as_theirs(ours, theirs, stops, texts)


def test_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    criteria = [MaxTimeCriteria(2.0), MaxTimeCriteria(2.0, initial_timestamp=97.5)]
    rows = np.zeros((3, 4), int)
    assert [criterion(rows, None).tolist() for criterion in criteria] == [[False] * 3, [True] * 3]
    now[0] = 102.0
    assert not criteria[0](rows).any()
    now[0] = 102.5
    assert criteria[0](rows).all()


def torch_tensor(values: Any) -> Any:
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize("array", [jnp.array, pytest.param(torch_tensor, marks=pytest.mark.live)])
def test_one_criterion_is_enough(array: Any) -> None:
    rows = np.arange(8).reshape(4, 2)
    seen = []

    def third(input_ids: np.ndarray, scores: Any, **kwargs: Any) -> Any:
        seen.append((scores, kwargs))
        return input_ids[:, -1] == 5

    answers = [
        third,
        lambda ids, scores, **kwargs: False,
        lambda ids, scores, **kwargs: np.bool_(False),
        lambda ids, scores, **kwargs: array(False),
        lambda ids, scores, **kwargs: [True, False, False, False],
        lambda ids, scores, **kwargs: array([False, False, False, False]),
    ]
    done = StoppingCriteriaList(answers)(rows, "scores", extra=1)
    assert done.dtype == bool
    assert done.tolist() == [True, False, True, False]
    assert seen == [("scores", {"extra": 1})]
    assert StoppingCriteriaList([lambda ids, scores: array(True)])(rows).tolist() == [True] * 4
    assert StoppingCriteriaList()(rows).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "returned None; expected a bool"),
        (1, TypeError, "returned 1; expected a bool"),
        (np.zeros(2), TypeError, "returned an array of float64"),
        (np.zeros(3, bool), ValueError, r"shape \(3,\); expected one bool, or shape \(2,\)"),
        (jnp.zeros((2, 1), bool), ValueError, r"shape \(2, 1\)"),
        ([True], ValueError, r"shape \(1,\)"),
    ],
)
def test_rejects_other_results(result: Any, error: type[Exception], message: str) -> None:
    class MyCriterion:
        def __call__(self, input_ids: np.ndarray, scores: Any, **kwargs: Any) -> Any:
            return result

    with pytest.raises(error, match=f"MyCriterion.*{message}"):
        StoppingCriteriaList([MyCriterion()])(np.zeros((2, 3), int))
