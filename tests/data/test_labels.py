"""Label sets: order, lookup, and the way through a model's config."""

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
def test_order(names: list[str], expected: tuple[str, ...]) -> None:
    assert Labels.from_names(names).names == expected
    assert Labels.from_names(reversed(names)).names == expected


def test_ids() -> None:
    labels = Labels(("cash", "card", "coin"))
    assert [labels.id(name) for name in labels.names] == [0, 1, 2]
    assert len(labels) == 3
    with pytest.raises(ValueError, match=r"label 'cart' is not among the 3 known: 'card', \.\.\."):
        labels.id("cart")
    many = Labels.from_names(map(str, range(77)))
    with pytest.raises(ValueError, match=r"'xyz' is not among the 77 known: '0', '1', '2', '3', '4', \.\.\."):
        many.id("xyz")


@pytest.mark.parametrize(("names", "fault"), [((), "at least one"), (("a", "b", "a"), "'a' is there twice")])
def test_no_label_set(names: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Labels(names)


def test_through_a_config() -> None:
    labels = Labels(("no", "yes", "maybe"))
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for config in (
        Phi3Config(**sizes, **tokens, **labels.to_config()),
        Phi3Config(**sizes, **tokens, num_labels=7).replace(**labels.to_config()),
    ):
        assert config.num_labels == 3
        assert config.label2id == {"no": 0, "yes": 1, "maybe": 2}
        assert Labels.from_config(Phi3Config.from_dict(config.to_dict())) == labels


@pytest.mark.parametrize(
    ("value", "name"), [(" a b ", "a b"), (3, "3"), (3.0, "3"), (-1, "-1"), (True, "True")]
)
def test_label_names(value: object, name: str) -> None:
    assert label_name(value) == name


@pytest.mark.parametrize("value", [None, "", " ", 1.5, math.nan, ["a"]])
def test_no_label_names(value: object) -> None:
    with pytest.raises(ValueError, match="label is"):
        label_name(value)
