"""The built-in data set is reproducible, its splits are disjoint, and tasks see the same sentences."""

import json
from collections import Counter

import pytest

from phi3_jax.data import generated
from phi3_jax.data.generated import COUNTS, generated_rows


def test_splits_have_their_sizes_and_are_disjoint() -> None:
    texts = {
        split: [row.values["text"] for row in generated_rows(split, "sequence-classification")]
        for split in COUNTS
    }
    assert {split: len(rows) for split, rows in texts.items()} == {
        "train": 2000,
        "validation": 250,
        "test": 250,
    }
    everything = [text for rows in texts.values() for text in rows]
    assert len(set(everything)) == 2500
    for split in COUNTS:  # with another seed too
        other = {row.values["text"] for row in generated_rows(split, "sequence-classification", seed=1)}
        outside = {text for name, rows in texts.items() if name != split for text in rows}
        assert not other & outside
        assert other != set(texts[split])
    assert all(text == text.lower() and text.isascii() and "  " not in text for text in everything)
    assert not any(mark in text for text in everything for mark in "{},")


def test_rows_are_reproducible() -> None:
    rows = list(generated_rows("test", "causal-lm", 20, seed=3))
    assert list(generated_rows("test", "causal-lm", 20, seed=3)) == rows
    assert list(generated_rows("test", "causal-lm", 7, seed=3)) == rows[:7]
    assert str(rows[4].place) == "generated-test, row 5"
    # A change here changes the data of every demonstration.
    first = next(generated_rows("train", "sequence-classification"))
    assert first.values == {
        "text": "excuse me take dark chocolate off the shopping list",
        "label": "shopping_list",
    }


def test_tasks_see_the_same_sentences() -> None:
    views = ("sequence-classification", "token-classification", "causal-lm")
    for text, tags, chat in zip(*(generated_rows("train", view, 500) for view in views), strict=True):
        user, assistant = chat.values["messages"]
        assert user == {"role": "user", "content": text.values["text"]}
        assert " ".join(tags.values["words"]) == text.values["text"]
        answer = json.loads(assistant["content"])
        assert assistant["role"] == "assistant"
        assert answer.pop("intent") == text.values["label"]
        assert spans(tags.values["words"], tags.values["labels"]) == answer
        assert all(len(set(phrases)) == len(phrases) for phrases in answer.values())


def spans(words: list[str], labels: list[str]) -> dict[str, list[str]]:
    """Returns the phrases that BIO tags mark, by slot."""
    phrases: dict[str, list[str]] = {}
    for word, label in zip(words, labels, strict=True):
        if label.startswith("B-"):
            phrases.setdefault(label[2:], []).append(word)
        elif label.startswith("I-"):
            phrases[label[2:]][-1] += f" {word}"
    return phrases


def test_every_split_has_every_class() -> None:
    for split in COUNTS:
        rows = list(generated_rows(split, "sequence-classification"))
        counts = Counter(row.values["label"] for row in rows)
        assert len(counts) == 13
        assert min(counts.values()) > len(rows) / 13 / 3
    tags = {tag for row in generated_rows("train", "token-classification") for tag in row.values["labels"]}
    assert len(tags) == 1 + 2 * 13


def test_rejects_unknown_names() -> None:
    with pytest.raises(ValueError, match="split='dev'; use one of 'train', 'validation', 'test'"):
        generated_rows("dev", "causal-lm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task='causal'; use one of 'sequence-classification'"):
        generated_rows("train", "causal")  # type: ignore[arg-type]


def test_rejects_more_rows_than_the_grammar_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_INTENTS", {"weather": ("do i need an umbrella {date}",)})
    with pytest.raises(ValueError, match="count=1000: the grammar has little more than"):
        list(generated_rows("test", "causal-lm", 1000))
