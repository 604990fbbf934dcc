"""Labels: their order, ids, and a model's config."""

import math

import pytest

from phi3_jax import Phi3Config
from phi3_jax.data.labels import Labels, label_name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1", "1"], ("-1", "1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["I-b", "B-b", "O", "B-a"], ("O", "B-a", "B-b", "I-b")),
        (["Z", "O", "A"], ("A", "O", "Z")),
    ],
)
def test_sorts_names(names: list[str], expected: tuple[str, ...]) -> None:
    assert Labels.from_names(names).names == expected
    assert Labels.from_names(reversed(names)).names == expected


def test_looks_up_ids() -> None:
    labels = Labels(("cash", "card", "coin"))
    assert [labels.id(name) for name in labels.names] == [0, 1, 2]
    assert len(labels) == 3
    with pytest.raises(ValueError, match=r"label 'cart' is not one of the 3 labels: 'card', \.\.\."):
        labels.id("cart")
    many = Labels.from_names(map(str, range(77)))
    with pytest.raises(
        ValueError, match=r"'xyz' is not one of the 77 labels: '0', '1', '2', '3', '4', \.\.\."
    ):
        many.id("xyz")


@pytest.mark.parametrize(("names", "fault"), [((), "at least one"), (("a", "b", "a"), "'a' occurs twice")])
def test_rejects_empty_and_repeated_names(names: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Labels(names)


def test_reads_a_config() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = Phi3Config(**sizes, **tokens, id2label={0: "no", 1: "yes", 2: "maybe"})
    assert Labels.from_config(Phi3Config.from_dict(config.to_dict())) == Labels(("no", "yes", "maybe"))


@pytest.mark.parametrize(
    ("value", "name"), [(" a b ", "a b"), (3, "3"), (3.0, "3"), (-1, "-1"), (True, "True")]
)
def test_text_and_whole_numbers_name_labels(value: object, name: str) -> None:
    assert label_name(value) == name


@pytest.mark.parametrize("value", [None, "", " ", 1.5, math.nan, ["a"]])
def test_rejects_labels_without_a_name(value: object) -> None:
    with pytest.raises(ValueError, match="label is"):
        label_name(value)
