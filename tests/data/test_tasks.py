"""Encoding rows: ids and labels match transformers, and errors name the row."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from their_tokenizer import TheirTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from phi3_jax.data.encoding import Example
from phi3_jax.data.labels import Labels
from phi3_jax.data.rows import BadRowError, BadRows, Place, Row
from phi3_jax.data.tasks import (
    CausalLM,
    SequenceClassification,
    Task,
    TokenClassification,
    encode_rows,
)
from phi3_jax.tokenizer import Phi3Tokenizer

SENTENCES = [
    "The old bridge over the river is closed on Monday, and nobody knows why.",
    "Anna's train left at 10:45 from platform 3; it isn't late.",
    "  two spaces in front, naïve café 😀",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>"]
SPECIALS += ["<|im_end|>", "<|im_sep|>"]
PLACE = Place("rows.csv", 7)


def row(**values: Any) -> Row:
    return Row(values, PLACE)


def write_tokenizer(folder: Path, *, surrounded: bool) -> Path:
    """Writes a byte-level tokenizer; a `surrounded` one puts texts between <s> and </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    if surrounded:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["plain", "surrounded"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both") / request.param
    folder.mkdir()
    return write_tokenizer(folder, surrounded=request.param == "surrounded")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Phi3Tokenizer:
    return Phi3Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("plain"), surrounded=False))


def only(examples: list[Example]) -> Example:
    (example,) = examples
    assert example.place == PLACE
    return example


# Sequence classification


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [9, 40, 512])
def test_matches_transformers_on_texts(folder: Path, pair: bool, side: str, max_length: int) -> None:
    theirs = TheirTokenizer(folder.name, folder, truncation_side=side)
    ours = Phi3Tokenizer.from_pretrained(folder, truncation_side=side)
    task = SequenceClassification("a", "b" if pair else None, label=None, max_length=max_length)
    both = list(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
    texts = both if pair else SENTENCES
    whole = theirs.ask("__call__", texts)
    cut = theirs.ask("__call__", texts, truncation=True, max_length=max_length)
    for (first, second), uncut, expected in zip(both, whole, cut, strict=True):
        example = only(task.encode(row(a=first, b=second), ours, Labels(("x",))))
        assert example.input_ids == expected["input_ids"]
        assert example.truncated == (len(uncut["input_ids"]) > max_length)
        assert (example.labels, example.firsts) == (None, None)


def test_encodes_one_label(plain: Phi3Tokenizer) -> None:
    task = SequenceClassification(label="kind")
    rows = [
        row(text="a", kind=10),
        row(text="b", kind="9"),
        row(text="c", kind=10.0),
        row(text="d", kind=None),
    ]
    labels = task.label_set(rows, BadRows(skip=True))
    assert labels.names == ("9", "10")
    with pytest.raises(BadRowError, match=r"^rows\.csv, line 7: 'kind': label is missing"):
        task.label_set(rows)
    assert [only(task.encode(r, plain, labels)).labels for r in rows[:3]] == [1, 0, 1]
    with pytest.raises(BadRowError, match=r"^rows\.csv, line 7: 'kind': label is missing"):
        task.encode(rows[3], plain, labels)
    with pytest.raises(
        BadRowError, match=r"^rows\.csv, line 7: label '11' is not one of the 2 labels: '9', '10'"
    ):
        task.encode(row(text="a", kind=11), plain, labels)


def test_encodes_several_labels(plain: Phi3Tokenizer) -> None:
    task = SequenceClassification(
        label="tags", problem_type="multi_label_classification", label_separator=";"
    )
    rows = [row(text="a", tags="news; old"), row(text="b", tags=["sport"]), row(text="c", tags=" ")]
    labels = task.label_set(rows)
    assert labels.names == ("news", "old", "sport")
    targets = [only(task.encode(r, plain, labels)).labels for r in rows]
    assert targets == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    for tags, fault in (
        ("news;;old", "label is empty"),
        ("olds", "'olds' is not one of"),
        (3, "expected a list"),
    ):
        with pytest.raises(BadRowError, match=fault):
            task.encode(row(text="a", tags=tags), plain, labels)


def test_encodes_a_column_for_each_label(plain: Phi3Tokenizer) -> None:
    task = SequenceClassification(label=("old", "new"), problem_type="multi_label_classification")
    labels = task.label_set([])
    assert labels.names == ("old", "new")
    for old, new in ((1, 0), ("1", "0.0"), (True, False), (1.0, 0)):
        assert only(task.encode(row(text="a", old=old, new=new), plain, labels)).labels == [1.0, 0.0]
    for value in (2, "yes", None, 0.5):
        with pytest.raises(BadRowError, match=r"'new' is .*expected"):
            task.encode(row(text="a", old=1, new=value), plain, labels)
    with pytest.raises(BadRowError, match="there is no column 'new'; the columns are 'text', 'old'"):
        task.encode(row(text="a", old=1), plain, labels)


def test_encodes_numbers(plain: Phi3Tokenizer) -> None:
    one = SequenceClassification(label="score", problem_type="regression")
    assert one.label_set([]).names == ("score",)
    assert only(one.encode(row(text="a", score="-2.5e1"), plain, Labels(("score",)))).labels == [-25.0]
    two = replace(one, label=("score", "age"))
    labels = two.label_set([])
    assert labels.names == ("score", "age")
    assert only(two.encode(row(text="a", score=1, age=" 2 "), plain, labels)).labels == [1.0, 2.0]
    for value in ("nan", "inf", float("nan"), 1e300, 10**400, "", "many", None, True, [1.0]):
        with pytest.raises(BadRowError, match=r"'age' is .*expected a finite float32 number"):
            two.encode(row(text="a", score=1, age=value), plain, labels)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": None}, "'text' is None; expected text"),
        ({"text": "half \ud800"}, "half of a surrogate pair"),
        ({"sentence": "a", "label": 1}, "there is no column 'text'; the columns are 'sentence', 'label'"),
    ],
)
def test_rejects_rows_without_text(plain: Phi3Tokenizer, values: dict[str, Any], fault: str) -> None:
    for task in (SequenceClassification(label=None), CausalLM()):
        with pytest.raises(BadRowError, match=rf"^rows\.csv, line 7: .*{fault}"):
            task.encode(Row(values, PLACE), plain, Labels(("x",)))


def test_rejects_rows_without_labels() -> None:
    with pytest.raises(ValueError, match="the rows have no labels"):
        SequenceClassification().label_set([])
    with pytest.raises(ValueError, match="all rows have the label 'a'"):
        SequenceClassification().label_set([row(text="a", label="a")] * 2)
    with pytest.raises(BadRowError, match="line 7: there is no column 'label'"):
        SequenceClassification().label_set([row(text="a"), row(text="b")])
    with pytest.raises(ValueError, match="label=None"):
        SequenceClassification(label=None).label_set([])
    with pytest.raises(ValueError, match="labels=None"):
        TokenClassification(labels=None).label_set([])
    assert CausalLM().label_set([]) is None  # type: ignore[func-returns-value]


def test_rejects_contradicting_arguments() -> None:
    with pytest.raises(ValueError, match="problem_type='binary'; use one of 'single_label_classification'"):
        SequenceClassification(problem_type="binary")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names several columns"):
        SequenceClassification(label=("a", "b"))
    with pytest.raises(ValueError, match="max_length=1"):
        CausalLM(max_length=1)


def test_names_the_required_columns() -> None:
    assert SequenceClassification("a", "b", ("c", "d"), "regression").columns == ("a", "b", "c", "d")
    assert SequenceClassification(label=None).columns == ("text",)
    assert TokenClassification().columns == ("words", "labels")
    assert TokenClassification(labels=None).columns == ("words",)
    assert CausalLM().columns == ("text",)
    assert CausalLM(messages="talk").columns == ("talk",)


# Token classification

WORDS = ["Anna", "'s", "train", "left", "Naïve", "😀", "Café", "at", "10:45", "."]
TAGS = ["B-person", "O", "O", "O", "B-place", "I-place", "B-place", "O", "B-time", "O"]


def sentence(words: list[str] = WORDS, labels: list[Any] = TAGS) -> Row:
    return row(words=words, labels=labels)


def expected_firsts(word_ids: list[int | None]) -> list[bool]:
    return [word is not None and (at == 0 or word_ids[at - 1] != word) for at, word in enumerate(word_ids)]


def check_words(task: TokenClassification, folder: Path, side: str) -> None:
    theirs = TheirTokenizer(folder.name, folder, truncation_side=side)
    ours = Phi3Tokenizer.from_pretrained(folder, truncation_side=side)
    options: dict[str, Any] = {"truncation": True, "max_length": task.max_length}
    (encoding,) = theirs.ask("__call__", [WORDS], is_split_into_words=True, **options)
    (whole,) = theirs.ask("__call__", [WORDS], is_split_into_words=True)
    word_ids = encoding["word_ids"]
    labels = task.label_set([sentence()])
    example = only(task.encode(sentence(), ours, labels))
    assert example.input_ids == encoding["input_ids"]
    assert example.truncated == (len(whole["input_ids"]) > task.max_length)
    if side == "right":  # on the left, truncation may remove the first piece of a word
        assert example.firsts == expected_firsts(word_ids)
    assert isinstance(example.labels, list)
    for first, label, word in zip(example.firsts or [], example.labels, word_ids, strict=True):
        if word is None or not (first or task.label_all_pieces):
            assert label == -100
        else:
            tag = TAGS[word] if first else TAGS[word].replace("B-", "I-")
            assert label == labels.id(tag)


@pytest.mark.parametrize("all_pieces", [False, True])
@pytest.mark.parametrize(("side", "max_length"), [("right", 512), ("right", 14), ("left", 14)])
def test_matches_transformers_on_words(folder: Path, all_pieces: bool, side: str, max_length: int) -> None:
    task = TokenClassification(label_all_pieces=all_pieces, prefix_space=False, max_length=max_length)
    check_words(task, folder, side)


@pytest.mark.parametrize("name", ["phi-3", "phi-3-mini"])
def test_matches_transformers_on_words_of_phi_3(shared_data: Callable[..., Path], name: str) -> None:
    # Its vocabulary marks the start of words, so no space is added.
    for prefix_space in (False, True):
        check_words(
            TokenClassification(prefix_space=prefix_space), shared_data("phi3-tokenizer", name), "right"
        )


def test_adds_the_space_of_running_text(folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    words = SENTENCES[0].split()
    example = only(TokenClassification(labels=None).encode(sentence(words), tokenizer, Labels(("x",))))
    assert example.input_ids == tokenizer.encode(SENTENCES[0])
    assert example.labels is None
    spaced = [words[0], *(" " + word for word in words[1:])]
    (theirs,) = TheirTokenizer(folder.name, folder).ask("__call__", [spaced], is_split_into_words=True)
    assert example.input_ids == theirs["input_ids"]
    assert sum(example.firsts or []) == len(words)


def test_labels_all_pieces_of_a_word(plain: Phi3Tokenizer) -> None:
    task = TokenClassification(label_all_pieces=True)
    rows = [sentence(["Zürich"], ["B-city"])]
    labels = task.label_set(rows)
    assert labels.names == ("B-city", "I-city")
    targets = only(task.encode(rows[0], plain, labels)).labels
    assert isinstance(targets, list)
    assert len(targets) > 2
    assert targets == [0] + [1] * (len(targets) - 1)


@pytest.mark.parametrize(
    ("words", "labels", "fault"),
    [
        (["a", "b"], ["O"], "2 words and 1 labels; expected one for each"),
        ([], [], "'words' is empty"),
        (["a", " "], ["O", "O"], r"words\[1\] is ' '; expected a word"),
        (["a", 3], ["O", "O"], r"words\[1\] is 3; expected a word"),
        ("a b", ["O", "O"], "'words' is 'a b'; expected a list"),
        (["a"], "O", "'labels' is 'O'; expected a list of labels"),
        (["a"], [None], "'labels': label is missing"),
        (["a"], ["B-x"], "label 'B-x' is not one of"),
        (["\ud800"], ["O"], "half of a surrogate pair"),
    ],
)
def test_rejects_bad_sentences(plain: Phi3Tokenizer, words: Any, labels: Any, fault: str) -> None:
    with pytest.raises(BadRowError, match=rf"^rows\.csv, line 7: {fault}|line 7: .*{fault}"):
        TokenClassification().encode(sentence(words, labels), plain, Labels(("O",)))


def test_a_word_without_tokens_becomes_unk(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path, surrounded=False) / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Phi3Tokenizer.from_pretrained(tmp_path)
    task = TokenClassification(prefix_space=False)
    example = only(task.encode(sentence(["The", "\u200b", "old"], ["O"] * 3), ours, Labels(("O",))))
    assert sum(example.firsts or []) == 3
    assert ours.unk_token_id in example.input_ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["unk_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadRowError, match=r"no token for the word '\\u200b'"):
        task.encode(sentence(["\u200b"], ["O"]), Phi3Tokenizer.from_pretrained(tmp_path), Labels(("O",)))


def test_rejects_lengths_without_space_for_words(folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    least = len(tokenizer.encode("a"))
    assert TokenClassification(max_length=least).encode(sentence(), tokenizer, Labels(tuple(set(TAGS))))
    with pytest.raises(
        ValueError, match=f"max_length={least - 1} leaves no space for words; use {least} or more"
    ):
        TokenClassification(max_length=least - 1).encode(sentence(), tokenizer, Labels(tuple(set(TAGS))))


# Causal language models

TURNS = "{% for m in messages %}"
# transformers labels the text between `generation` and `endgeneration`.
TEMPLATES = {
    "end of turn": TURNS
    + "{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}{{ m.content + '<|end|>' }}"
    + "{% endgeneration %}{{ '\n' }}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "end of text too": "{{ bos_token }}"
    + TURNS
    + "{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m.content + '<|end|>' }}"
    + "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    + "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% elif messages[-1].role == 'user' %}"
    + "{{ eos_token }}{% endif %}",
    "prompt always": TURNS
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    + "{% else %}{{ '<|user|>' + m.content + '<|end|><|assistant|>' }}{% endif %}{% endfor %}",
    "words only": TURNS
    + "{% if m.role == 'assistant' %}{{ 'Bot:' }}{% generation %}{{ ' ' + m.content + '\n\n' }}"
    + "{% endgeneration %}{% else %}{{ m.role + ': ' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}",
    # The last space of the prompt is a part of the answer's first token.
    "tokens across the border": TURNS
    + "{% if m.role == 'assistant' %}{{ 'Bot: ' }}{% generation %}{{ m.content + '\n' }}"
    + "{% endgeneration %}{% else %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}",
    "system by default": "{% if messages[0].role != 'system' %}{{ '<|system|>Be kind.<|end|>' }}{% endif %}"
    + TURNS
    + "{{ '<|im_start|>' + m.role + '<|im_sep|>' }}{% if m.role == 'assistant' %}{% generation %}"
    + "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
}


def say(*contents: str, system: bool = False) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": "Answer briefly."}, *messages] if system else messages


CONVERSATIONS = [
    say("Is the bridge closed?", "Yes, on Monday."),
    say("Is it late?", "It isn't.", "Sure?", "naïve café 😀 <|user|> no", "And?", "\nTwo\n\nlines\n"),
    say("Which?", "bridge", "And?", "river on Monday"),
    say("The train?", " left at 10:45", "Thanks", system=True),
]


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_matches_transformers_on_labels_of_answers(folder: Path, template: str) -> None:
    theirs = TheirTokenizer(folder.name, folder)
    ours = Phi3Tokenizer.from_pretrained(folder)
    ours.chat_template = TEMPLATES[template]
    options = {
        "return_assistant_tokens_mask": True,
        "return_dict": True,
        "chat_template": TEMPLATES[template],
    }
    answers = theirs.ask("apply_chat_template", CONVERSATIONS, **options)
    for messages, whole in zip(CONVERSATIONS, answers, strict=True):
        expected = [
            token if labelled else -100
            for token, labelled in zip(whole["input_ids"], whole["assistant_masks"], strict=True)
        ]
        example = only(CausalLM(messages="m").encode(row(m=messages), ours))
        assert example.input_ids == whole["input_ids"]
        assert example.labels == expected
        assert not example.truncated


def labelled_texts(example: Example, tokenizer: Phi3Tokenizer) -> list[str]:
    assert isinstance(example.labels, list)
    runs = groupby(example.labels, lambda label: label == -100)
    return [tokenizer.decode(list(run)) for ignored, run in runs if not ignored]


def test_reads_messages_of_sharegpt(folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES["end of turn"]
    messages = say("Which?", "bridge", "And?", "river")
    theirs = [
        {"from": "human" if one["role"] == "user" else "gpt", "value": one["content"]} for one in messages
    ]
    task = CausalLM(messages="m")
    assert task.encode(row(m=theirs), tokenizer) == task.encode(row(m=messages), tokenizer)
    with pytest.raises(BadRowError, match="a message is from 'nobody'; expected one of human, user, gpt"):
        task.encode(row(m=[*theirs, {"from": "nobody", "value": ""}]), tokenizer)


def test_answers_of_weight_0_are_not_learnt(folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES["end of turn"]
    messages: list[dict[str, Any]] = [*say("Which?", "bridge", "And?", "river on Monday")]
    whole = only(CausalLM(messages="m").encode(row(m=messages), tokenizer))
    weighted = [*messages[:1], messages[1] | {"weight": 0}, messages[2], messages[3] | {"weight": None}]
    example = only(CausalLM(messages="m").encode(row(m=weighted), tokenizer))
    assert example.input_ids == whole.input_ids
    assert labelled_texts(example, tokenizer) == labelled_texts(whole, tokenizer)[1:]
    none = [*messages[:1], messages[1] | {"weight": 0}]
    with pytest.raises(BadRowError, match='no answer of the assistant with a "weight" other than 0'):
        CausalLM(messages="m").encode(row(m=none), tokenizer)
    with pytest.raises(BadRowError, match=r"messages\[1\] has the weight 0.5; expected 0 or 1"):
        CausalLM(messages="m").encode(row(m=[messages[0], messages[1] | {"weight": 0.5}]), tokenizer)


def test_the_template_writes_tools_or_they_are_refused(folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["end of turn"]
    tools = [{"name": "bridge"}]
    task = CausalLM(messages="m")
    example = only(task.encode(row(m=say("Which?", "bridge"), tools=tools), tokenizer))
    assert tokenizer.decode(example.input_ids).startswith('[{"name": "bridge"}]')
    assert labelled_texts(example, tokenizer) == ["bridge<|end|>"]
    assert only(task.encode(row(m=say("Which?", "bridge"), tools=None), tokenizer)).labels
    tokenizer.chat_template = TEMPLATES["end of turn"]
    with pytest.raises(BadRowError, match="the chat template does not write tools; remove it, or give"):
        task.encode(row(m=say("Which?", "bridge"), tools=tools), tokenizer)
    called = [*say("Which?"), {"role": "assistant", "content": "", "tool_calls": tools}]
    with pytest.raises(
        BadRowError, match=r"messages\[1\] has 'tool_calls', which the chat template does not"
    ):
        task.encode(row(m=called), tokenizer)
    with pytest.raises(BadRowError, match="the column 'functions' is not read; remove it"):
        task.encode(row(m=say("Which?", "bridge"), functions=tools), tokenizer)
    assert task.columns == ("m",)
    assert "tools" in task.optional_columns


@pytest.mark.parametrize("name", ["phi-3", "phi-3-mini"])
def test_labels_answers_of_phi_3_templates(shared_data: Callable[..., Path], name: str) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(shared_data("phi3-tokenizer", name))
    messages = say("Is it late?", "It isn't.", "Sure?", "Yes, I am.")
    example = only(CausalLM(messages="m").encode(row(m=messages), tokenizer))
    assert example.input_ids == tokenizer.apply_chat_template(messages)
    first, second = labelled_texts(example, tokenizer)
    assert first.strip() == "It isn't.<|end|>"
    assert second.strip() == "Yes, I am.<|end|>" + ("<|endoftext|>" if name == "phi-3-mini" else "")


def test_labels_answers_of_published_templates(
    shared_data: Callable[..., Path], plain: Phi3Tokenizer
) -> None:
    files = sorted(shared_data("phi3-configs").glob("*/chat_template*.txt"))
    assert files
    messages = say("Is it late?", "It isn't.", "Sure?", "Yes, I am.", system=True)
    for file in files:
        plain.chat_template = file.read_text(encoding="utf-8")
        example = only(CausalLM(messages="m").encode(row(m=messages), plain))
        ends = ("<|end|>", "<|im_end|>", "<|end|></s>", "<|end|>\n</s>")
        first, second = labelled_texts(example, plain)
        assert first in {f"It isn't.{end}" for end in ends[:2]}, file
        assert second in {f"Yes, I am.{end}" for end in ends}, file


def test_truncates_long_conversations_on_the_right(plain: Phi3Tokenizer) -> None:
    plain.chat_template = TEMPLATES["end of turn"]
    messages = say("Is it late?", "It isn't.", "Sure?", "Yes, I am.")
    whole = only(CausalLM(messages="m").encode(row(m=messages), plain))
    assert isinstance(whole.labels, list)
    start = next(at for at, label in enumerate(whole.labels) if label != -100)
    for max_length in range(2, len(whole.input_ids) + 2):
        task = CausalLM(messages="m", max_length=max_length)
        if max_length <= start:
            with pytest.raises(
                BadRowError, match=rf"starts within max_length={max_length}; the conversation has"
            ):
                task.encode(row(m=messages), plain)
            continue
        example = only(task.encode(row(m=messages), plain))
        assert example.input_ids == whole.input_ids[:max_length]
        assert example.labels == whole.labels[:max_length]
        assert example.truncated == (max_length < len(whole.input_ids))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (say("Hello?"), "messages have no answer of the assistant"),
        ([{"role": "assistant", "content": "Hi."}], "messages have no answer of the assistant"),
        ([], "messages is empty"),
        ([{"content": "Hi."}], r"messages\[0\] has no role"),
        ("Hello?", "'m' is 'Hello\\?'; expected a list"),
    ],
)
def test_rejects_bad_conversations(plain: Phi3Tokenizer, messages: Any, fault: str) -> None:
    plain.chat_template = TEMPLATES["end of turn"]
    with pytest.raises(BadRowError, match=rf"^rows\.csv, line 7: {fault}"):
        CausalLM(messages="m").encode(row(m=messages), plain)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{{ messages|length }}" + TEMPLATES["end of turn"],
            r"prompt for messages\[1\] is not a prefix",
        ),
        (
            TURNS + "{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
            "{{ 'I think. ' if m.role == 'assistant' and loop.last }}{{ m.content + '<|end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            r"writes messages\[1\] differently when other messages follow",
        ),
        ("{{ raise_exception('no such role') }}", "no such role"),
        (None, "no chat template"),
    ],
)
def test_rejects_templates_that_hide_the_answers(
    plain: Phi3Tokenizer, template: str | None, fault: str
) -> None:
    plain.chat_template = template
    with pytest.raises(BadRowError, match=rf"^rows\.csv, line 7: .*{fault}"):
        CausalLM(messages="m").encode(row(m=CONVERSATIONS[1]), plain)


def test_takes_token_ids_as_they_are(folder: Path) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    task = CausalLM(input_ids="ids", max_length=4, vocab_size=20)
    assert task.columns == ("ids",)
    parts = task.encode(row(ids=[3, 1, 4, 1, 5, 9]), tokenizer)
    assert [part.input_ids for part in parts] == [[3, 1, 4, 1], [1, 5, 9]]
    assert [part.labels for part in parts] == [part.input_ids for part in parts]
    for ids, message in {
        (3,): "expected two token ids or more",
        (3, 20): "'ids' has 20; expected token ids below 20",
        (-1, 3): "'ids' has -1",
        (3, 1.0): "'ids' has 1.0",
        "31": "'ids' is '31'; expected a list",
    }.items():
        with pytest.raises(BadRowError, match=re.escape(message)):
            task.encode(row(ids=ids if isinstance(ids, str) else list(ids)), tokenizer)


@pytest.mark.parametrize("max_length", [2, 3, 7, 1024])
def test_long_texts_continue_in_the_next_example(folder: Path, max_length: int) -> None:
    tokenizer = Phi3Tokenizer.from_pretrained(folder)
    for text in [*SENTENCES, "The", "The old"]:
        examples = CausalLM(max_length=max_length).encode(row(text=text), tokenizer)
        ids = tokenizer.encode(text)
        ids += [] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        joined = examples[0].input_ids + [token for e in examples[1:] for token in e.input_ids[1:]]
        assert joined == ids
        for example, following in zip(examples, [*examples[1:], None], strict=True):
            assert example.labels == example.input_ids
            assert 2 <= len(example.input_ids) <= max_length
            assert not example.truncated
            if following:
                assert len(example.input_ids) == max_length
                assert following.input_ids[0] == example.input_ids[-1]


def test_rejects_a_text_of_one_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, surrounded=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadRowError, match="'text' is a single token"):
        CausalLM().encode(row(text="a"), Phi3Tokenizer.from_pretrained(tmp_path))


def test_rejects_a_label_on_an_id_of_no_token(plain: Phi3Tokenizer) -> None:
    """A prompt may have such an id, an answer or a text may not."""
    dummy = plain.convert_tokens_to_ids("<|im_sep|>")
    task = CausalLM(dummy_token_ids=(dummy,))
    with pytest.raises(BadRowError, match=f"the id {dummy} is to be predicted, and the model has no such"):
        task.encode(row(text="The old bridge <|im_sep|> is"), plain)
    assert task.encode(row(text="The old bridge is"), plain)


def test_encodes_rows_and_skips_bad_ones(plain: Phi3Tokenizer) -> None:
    def encode(task: Task, rows: Iterable[Row], bad: BadRows) -> list[Example]:
        return list(encode_rows(task, rows, plain, labels, bad=bad))

    task = SequenceClassification()
    rows = [Row({"text": f"text {n}", "label": label}, Place("f", n)) for n, label in enumerate("abxba", 1)]
    labels = task.label_set([r for r in rows if r.values["label"] != "x"])
    bad = BadRows(skip=True)
    examples = encode(task, rows, bad)
    assert [example.place.line for example in examples] == [1, 2, 4, 5]
    assert [example.labels for example in examples] == [0, 1, 1, 0]
    assert bad.count == 1
    with pytest.raises(BadRowError, match="f, line 3: label 'x'"):
        encode(task, rows, BadRows(skip=False))
    parts = encode(CausalLM(max_length=3), rows, bad)
    assert [part.place.line for part in parts] == sorted(part.place.line for part in parts)
    assert len(parts) > len(rows)
