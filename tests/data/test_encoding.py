"""Rows that are encoded together have the results that each has alone, in order."""

from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from phi3_jax.data import encoding
from phi3_jax.data.encoding import Example, encode_items
from phi3_jax.data.labels import Labels
from phi3_jax.data.rows import BadRowError, BadRows, Place, Row
from phi3_jax.data.tasks import CausalLM, SequenceClassification, Task, TokenClassification, encode_rows
from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

WORDS = ["bridge", "over", "the", "river", "naïve", "😀", "unhappily", "a"]
LABELS = Labels(("O", "B-X", "I-X"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Phi3Tokenizer:
    """Returns a byte-level tokenizer that puts a text between <s> and </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Phi3Tokenizer.from_pretrained(folder, unk_token="<unk>", eos_token="</s>")


def make_rows(count: int) -> list[Row | BadRowError]:
    """Returns rows of 1 to 8 words; some are bad, and of one of them nothing could be read."""
    rows: list[Row | BadRowError] = []
    for number in range(1, count + 1):
        words = [WORDS[(number * 5 + n) % 8] for n in range(1 + number % 8)]
        values: dict[str, Any] = {
            "text": " ".join(words),
            "other": " ".join(words[::-1]),
            "label": "x" if number % 11 == 0 else "O",
            "words": words,
            "labels": [("O", "B-X")[n % 2] for n in range(len(words) - (number % 13 == 0))],
        }
        if number % 7 == 0:
            values |= {"text": " ", "words": [*words, ""]}
        place = Place("rows", number)
        rows.append(BadRowError(place, "broken") if number % 17 == 0 else Row(values, place))
    return rows


def result_of(task: Task, row: Row | BadRowError, tokenizer: Phi3Tokenizer) -> list[Example] | str:
    if isinstance(row, BadRowError):
        return str(row)
    try:
        return task.encode(row, tokenizer, LABELS)
    except BadRowError as error:
        return str(error)


@pytest.mark.parametrize(
    "task",
    [
        SequenceClassification(max_length=9),
        SequenceClassification(text_pair="other", max_length=11),
        TokenClassification(max_length=9),
        TokenClassification(label_all_pieces=True, prefix_space=False),
        CausalLM(max_length=5),
    ],
)
@pytest.mark.parametrize(("batch_rows", "characters"), [(1, 99), (4, 99), (128, 99), (128, 9999)])
def test_matches_rows_one_by_one(
    tokenizer: Phi3Tokenizer, monkeypatch: pytest.MonkeyPatch, task: Task, batch_rows: int, characters: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", characters)
    monkeypatch.setattr(encoding, "MOST_WORDS", 3)  # forgets some words
    rows = make_rows(60)
    alone = [result_of(task, row, tokenizer) for row in rows]
    together = list(encode_items(iter(rows), task.encoder(tokenizer, LABELS), tokenizer))
    assert [row for row, _ in together] == rows
    results = [str(each) if isinstance(each, BadRowError) else list(each) for _, each in together]
    assert results == alone
    examples = [each for result in results if not isinstance(result, str) for each in result]
    if not isinstance(task, CausalLM) and task.max_length < 512:
        assert {example.truncated for example in examples} == {False, True}
    assert sum(isinstance(result, str) for result in results) > 9


def test_an_error_comes_after_the_rows_before_it(tokenizer: Phi3Tokenizer) -> None:
    def rows() -> Iterator[Row]:
        for number, text in enumerate(["a", " ", "the", "over"], 1):
            yield Row({"text": text}, Place("rows", number))
        raise UserError("rows is not a gzip file")

    task = SequenceClassification(label=None)
    with pytest.raises(BadRowError, match=r"rows, line 2: 'text' is empty"):
        list(encode_rows(task, rows(), tokenizer, None, bad=BadRows(skip=False)))
    bad = BadRows(skip=True)
    examples = encode_rows(task, rows(), tokenizer, None, bad=bad)
    assert [next(examples).place.line for _ in range(3)] == [1, 3, 4]
    assert bad.count == 1
    with pytest.raises(UserError, match="rows is not a gzip file"):
        next(examples)


def test_a_text_that_the_tokenizer_refuses_fails_its_row_only(
    tokenizer: Phi3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_batch = tokenizer.backend.encode_batch

    def fail(texts: list[str]) -> list[list[int]]:
        if any("river" in text for text in texts):
            raise UserError("it breaks the library")
        return encode_batch(texts)

    rows = [
        Row({"text": text}, Place("rows", n)) for n, text in enumerate(["over", "the river", "bridge"], 1)
    ]
    task = SequenceClassification(label=None)
    expected = [result_of(task, row, tokenizer) for row in rows]
    monkeypatch.setattr(tokenizer.backend, "encode_batch", fail)
    monkeypatch.setattr(tokenizer.backend, "encode", lambda text: fail([text])[0])
    results = [result for _, result in encode_items(rows, task.encoder(tokenizer, None), tokenizer)]
    assert [list(results[0]), list(results[2])] == [expected[0], expected[2]]  # type: ignore[arg-type]
    assert str(results[1]) == "rows, line 2: it breaks the library"


@pytest.mark.parametrize(("batch_rows", "characters"), [(5, 9999), (999, 4 * len("the river"))])
def test_reads_no_more_than_two_batches_ahead(
    tokenizer: Phi3Tokenizer, monkeypatch: pytest.MonkeyPatch, batch_rows: int, characters: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", characters)
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for read in range(1, 101):
            yield Row({"text": "the river"}, Place("rows", read))

    task = SequenceClassification(label=None)
    results = encode_items(rows(), task.encoder(tokenizer, None), tokenizer)
    ahead = [read - done for done, _ in enumerate(results)]
    assert len(ahead) == 100
    assert max(ahead) == 10
