"""The built-in data set: the same every time, no sentence in two splits, three views of one sentence."""

import json
from collections import Counter

import pytest

from phi3_jax.data import generated
from phi3_jax.data.generated import COUNTS, generated_rows


def test_the_splits_have_their_sizes_and_nothing_in_common() -> None:
    texts = {
        split: [row.values["text"] for row in generated_rows(split, "sequence-classification")]
        for split in COUNTS
    }
    assert {split: len(found) for split, found in texts.items()} == {
        "train": 2000,
        "validation": 250,
        "test": 250,
    }
    everything = [text for found in texts.values() for text in found]
    assert len(set(everything)) == 2500
    for split in COUNTS:  # nor with another seed
        other = {row.values["text"] for row in generated_rows(split, "sequence-classification", seed=1)}
        outside = {text for name, found in texts.items() if name != split for text in found}
        assert not other & outside
        assert other != set(texts[split])
    assert all(text == text.lower() and text.isascii() and "  " not in text for text in everything)
    assert not any(mark in text for text in everything for mark in "{},")


def test_the_same_arguments_give_the_same_rows() -> None:
    rows = list(generated_rows("test", "causal-lm", 20, seed=3))
    assert list(generated_rows("test", "causal-lm", 20, seed=3)) == rows
    assert list(generated_rows("test", "causal-lm", 7, seed=3)) == rows[:7]
    assert str(rows[4].place) == "generated-test, row 5"
    # A change here changes what every demonstration run learns.
    first = next(generated_rows("train", "sequence-classification"))
    assert first.values == {
        "text": "excuse me take dark chocolate off the shopping list",
        "label": "shopping_list",
    }


def test_three_views_of_the_same_sentences() -> None:
    views = ("sequence-classification", "token-classification", "causal-lm")
    for text, tags, chat in zip(*(generated_rows("train", view, 500) for view in views), strict=True):
        user, assistant = chat.values["messages"]
        assert user == {"role": "user", "content": text.values["text"]}
        assert " ".join(tags.values["words"]) == text.values["text"]
        answer = json.loads(assistant["content"])
        assert assistant["role"] == "assistant"
        assert answer.pop("intent") == text.values["label"]
        assert spans(tags.values["words"], tags.values["labels"]) == answer
        assert all(len(set(found)) == len(found) for found in answer.values())


def spans(words: list[str], labels: list[str]) -> dict[str, list[str]]:
    """Slots with what BIO tags say stands in them."""
    found: dict[str, list[str]] = {}
    for word, label in zip(words, labels, strict=True):
        if label.startswith("B-"):
            found.setdefault(label[2:], []).append(word)
        elif label.startswith("I-"):
            found[label[2:]][-1] += f" {word}"
    return found


def test_every_class_is_in_every_split() -> None:
    for split in COUNTS:
        rows = list(generated_rows(split, "sequence-classification"))
        counts = Counter(row.values["label"] for row in rows)
        assert len(counts) == 13
        assert min(counts.values()) > len(rows) / 13 / 3
    tags = {tag for row in generated_rows("train", "token-classification") for tag in row.values["labels"]}
    assert len(tags) == 1 + 2 * 13


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="split='dev'; use one of 'train', 'validation', 'test'"):
        generated_rows("dev", "causal-lm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task='causal'; use one of 'sequence-classification'"):
        generated_rows("train", "causal")  # type: ignore[arg-type]


def test_more_than_the_grammar_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_INTENTS", {"weather": ("do i need an umbrella {date}",)})
    with pytest.raises(ValueError, match="count=1000: the grammar has little more than"):
        list(generated_rows("test", "causal-lm", 1000))
