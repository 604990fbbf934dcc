"""Tasks that turn rows into examples: classes of texts, classes of words, or the next token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from phi3_jax.data.chat_examples import as_messages, encode_chat
from phi3_jax.data.columns import (
    check_characters,
    check_two_classes,
    collect_labels,
    errors_of,
    label_id,
    label_names,
    read_list,
    read_number,
    read_text,
    read_value,
    read_zero_or_one,
)
from phi3_jax.data.labels import Labels
from phi3_jax.data.rows import BadRowError, BadRows, Place, Row
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.tokenizer import Phi3Tokenizer

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Example:
    """A tokenised row, or a part of one."""

    input_ids: list[int]
    labels: int | list[float] | list[int] | None
    """A class; a number for each class or output; a class or id for each token (-100: ignored)."""
    place: Place
    firsts: list[bool] | None = None
    """Whether each token is the first of a word."""
    truncated: bool = False
    """Whether the maximum length cut tokens off."""


@dataclass(frozen=True)
class SequenceClassification:
    """Predicts a class, several classes or numbers for a text or a pair of texts.

    Args:
        label: a column, or several columns: each has 0 or 1 for the class of its name, or a number for
            regression. None if rows are not labelled.
        label_separator: separates the labels in one column of several labels; an empty text has no label.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str | tuple[str, ...] | None = "label"
    problem_type: ProblemType = "single_label_classification"
    label_separator: str = "|"
    max_length: int = 512

    def __post_init__(self) -> None:
        known = get_args(ProblemType)
        if self.problem_type not in known:
            raise UserError(f"problem_type={self.problem_type!r}; use one of {', '.join(map(repr, known))}")
        if self.problem_type == "single_label_classification" and isinstance(self.label, tuple):
            raise UserError(
                f"label={self.label!r} names several columns, but single_label_classification takes one; use "
                "multi_label_classification for columns of 0 and 1"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that rows must have."""
        return (self.text, *filter(None, [self.text_pair]), *self._label_columns)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that are read where rows have them."""
        return ()

    @property
    def _label_columns(self) -> tuple[str, ...]:
        return (self.label,) if isinstance(self.label, str) else self.label or ()

    @property
    def has_label_columns(self) -> bool:
        """Whether each output has a column, whose name is its label."""
        return self.problem_type == "regression" or isinstance(self.label, tuple)

    def label_set(self, rows: Iterable[Row], bad: BadRows | None = None) -> Labels:
        """Returns the classes of the good rows, or the names of the columns if each output has one.

        Raises:
            BadRowError: a row is bad, and `bad` does not skip it.
            UserError: there are no labels, or there is only one class.
        """
        if self.label is None:
            raise UserError("label=None, so there are no classes; name the column that holds them")
        if self.has_label_columns:
            return Labels(self._label_columns)
        bad = bad or BadRows(skip=False)
        labels = collect_labels(rows, self.label_names, bad)
        if self.problem_type == "single_label_classification":
            check_two_classes(labels, bad)
        return labels

    def label_names(self, row: Row) -> list[str]:
        """Returns the names of the row's classes; none where each output has a column.

        Raises:
            BadRowError: as `encode`.
        """
        self._texts(row)
        return [] if self.label is None or self.has_label_columns else self._names(row)

    def encode(self, row: Row, tokenizer: Phi3Tokenizer, labels: Labels) -> list[Example]:
        """Returns one example, with the ids of `tokenizer(text, text_pair, truncation=True)`.

        Raises:
            BadRowError: there is no text, or the label is missing, unknown or not a number.
        """
        text, pair = self._texts(row)
        target = None if self.label is None else self._target(row, labels)
        cut: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        with errors_of(row):
            ids = tokenizer(text, pair, padding=False).input_ids[0]
            if truncated := len(ids) > self.max_length:
                ids = tokenizer(text, pair, padding=False, **cut).input_ids[0]
        return [Example(ids.tolist(), target, row.place, truncated=truncated)]

    def _texts(self, row: Row) -> tuple[str, str | None]:
        text = read_text(row, self.text)
        return text, None if self.text_pair is None else read_text(row, self.text_pair, may_be_empty=True)

    def _target(self, row: Row, labels: Labels) -> int | list[float]:
        if self.problem_type == "regression":
            return [read_number(row, column) for column in self._label_columns]
        if isinstance(self.label, tuple):
            return [read_zero_or_one(row, column) for column in self.label]
        chosen = [label_id(row, labels, name) for name in self._names(row)]
        if self.problem_type == "single_label_classification":
            return chosen[0]
        return [float(index in chosen) for index in range(len(labels))]

    def _names(self, row: Row) -> list[str]:
        """Returns the names of a row's classes."""
        (column,) = self._label_columns
        value = read_value(row, column)
        if self.problem_type == "multi_label_classification":
            if isinstance(value, str):
                value = value.split(self.label_separator) if value.strip() else []
            return label_names(row, column, value)
        return label_names(row, column, [value])


@dataclass(frozen=True)
class TokenClassification:
    """Predicts a class for each word of a text.

    Words are encoded one by one, as transformers does with `is_split_into_words`. A byte-level vocabulary has
    other tokens for a word without a space before it. So `prefix_space` adds the space of running text to
    every word but the first. Without it, the ids are those of transformers; vocabularies that mark the start
    of words themselves give these ids either way. A word without tokens becomes the unk token, so that every
    word has a prediction.

    Args:
        labels: None if rows are not labelled.
        label_all_pieces: labels every token of a word (I-X after a first B-X), not only the first.
    """

    words: str = "words"
    labels: str | None = "labels"
    label_all_pieces: bool = False
    prefix_space: bool = True
    max_length: int = 512

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that rows must have."""
        return (self.words, *filter(None, [self.labels]))

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that are read where rows have them."""
        return ()

    def label_set(self, rows: Iterable[Row], bad: BadRows | None = None) -> Labels:
        """Returns the tags of the good rows.

        Raises:
            BadRowError: a row is bad, and `bad` does not skip it.
            UserError: there are no labels.
        """
        if self.labels is None:
            raise UserError("labels=None, so there are no tags; name the column that holds them")
        return collect_labels(rows, self.label_names, bad or BadRows(skip=False))

    def label_names(self, row: Row) -> list[str]:
        """Returns the tags of the row's words and, with `label_all_pieces`, of the words' other pieces.

        Raises:
            BadRowError: as `encode`.
        """
        names = self._names(row, self._words(row))
        return names + [_inside(name) for name in names] if self.label_all_pieces else names

    def encode(self, row: Row, tokenizer: Phi3Tokenizer, labels: Labels) -> list[Example]:
        """Returns one example, whose `firsts` are the tokens that predict their words' classes.

        Raises:
            BadRowError: there are no words, a word is empty, there is not one label for each word, or a label
                is unknown.
        """
        words = self._words(row)
        names = None if self.labels is None else self._names(row, words)
        pieces = self._pieces(row, words, tokenizer)
        firsts = [position == 0 for piece in pieces for position in range(len(piece))]
        targets: list[int] = []
        if names is not None:
            for piece, name in zip(pieces, names, strict=True):
                inside = label_id(row, labels, _inside(name)) if self.label_all_pieces else IGNORE_INDEX
                targets += [label_id(row, labels, name), *[inside] * (len(piece) - 1)]
        before, after = _special_ids(tokenizer)
        space = self.max_length - len(before) - len(after)
        if space < 1:
            least = len(before) + len(after) + 1
            raise UserError(f"max_length={self.max_length} leaves no space for words; use {least} or more")
        count = len(firsts)
        kept = (
            slice(0, space) if tokenizer.truncation_side == "right" else slice(max(count - space, 0), count)
        )
        ids = [token for piece in pieces for token in piece]
        return [
            Example(
                [*before, *ids[kept], *after],
                None if names is None else _surround(targets[kept], IGNORE_INDEX, before, after),
                row.place,
                firsts=_surround(firsts[kept], False, before, after),
                truncated=count > space,
            )
        ]

    def _words(self, row: Row) -> list[str]:
        words = read_list(row, self.words)
        if not words:
            raise BadRowError(row.place, f"{self.words!r} is empty")
        for index, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                raise BadRowError(row.place, f"{self.words}[{index}] is {word!r:.40}; expected a word")
            check_characters(row, f"{self.words}[{index}]", word)
        return words

    def _names(self, row: Row, words: Sequence[str]) -> list[str]:
        assert self.labels is not None
        names = label_names(row, self.labels, read_value(row, self.labels))
        if len(names) != len(words):
            raise BadRowError(row.place, f"{len(words)} words and {len(names)} labels; expected one for each")
        return names

    def _pieces(self, row: Row, words: Sequence[str], tokenizer: Phi3Tokenizer) -> list[list[int]]:
        space = " " if self.prefix_space and not _marks_word_starts(tokenizer) else ""
        with errors_of(row):
            pieces = [
                tokenizer.encode(space + word if index else word, add_special_tokens=False)
                for index, word in enumerate(words)
            ]
        for index, piece in enumerate(pieces):
            if not piece:
                if tokenizer.unk_token_id is None:
                    raise BadRowError(row.place, f"the tokenizer has no token for the word {words[index]!r}")
                piece.append(tokenizer.unk_token_id)
        return pieces


@dataclass(frozen=True)
class CausalLM:
    """Predicts the next token of raw texts, or of the assistant's answers in conversations.

    Beside its messages a row may have `tools`, descriptions of functions for the chat template.

    Args:
        messages: column of conversations, which the tokenizer's chat template formats; or None. Messages have
            `role` and `content`, or ShareGPT's `from` and `value`.
        text: column of raw texts, if `messages` is None.
        max_length: truncates conversations; texts continue in the next example.
    """

    messages: str | None = None
    text: str = "text"
    max_length: int = 1024

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}; predicting the next token needs at least 2")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that rows must have."""
        return (self.text if self.messages is None else self.messages,)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that are read where rows have them."""
        return () if self.messages is None else (TOOLS, *_NOT_READ)

    def label_set(self, rows: Iterable[Row], bad: BadRows | None = None) -> None:
        """Returns None: the classes are the vocabulary."""

    def label_names(self, row: Row) -> list[str]:
        """Returns no names: the classes are the vocabulary."""
        return []

    def encode(self, row: Row, tokenizer: Phi3Tokenizer, labels: Labels | None = None) -> list[Example]:
        """Returns the example of a conversation, or the examples of a text; labels are ids, not shifted.

        A text ends with the eos token. The last token of an example is the first of the next, so that every
        token but the text's first is predicted once.

        Raises:
            BadRowError: there is no text or no answer of the assistant, or the chat template fails.
        """
        if self.messages is not None:
            messages = read_list(row, self.messages)
            for column in _NOT_READ:
                if row.values.get(column):
                    raise BadRowError(row.place, f"the column {column!r} is not read; remove it")
            tools = read_list(row, TOOLS) if row.values.get(TOOLS) else None
            with errors_of(row):
                ids, targets, truncated = encode_chat(
                    as_messages(messages), tokenizer, self.max_length, tools
                )
            return [Example(ids, targets, row.place, truncated=truncated)]
        ids = self._text_ids(row, tokenizer)
        starts = range(0, len(ids) - 1, self.max_length - 1)
        parts = [ids[start : start + self.max_length] for start in starts]
        return [Example(part, part, row.place) for part in parts]

    def _text_ids(self, row: Row, tokenizer: Phi3Tokenizer) -> list[int]:
        text = read_text(row, self.text)
        with errors_of(row):
            ids = tokenizer.encode(text)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        if len(ids) < 2:
            raise BadRowError(
                row.place, f"{self.text!r} is a single token, which nothing predicts: {text!r:.40}"
            )
        return ids


TOOLS = "tools"
_NOT_READ = ("functions", "documents", "chat_template_kwargs")
"""Columns that other programs hand to the chat template."""

Task = SequenceClassification | TokenClassification | CausalLM


def encode_rows(
    task: Task, rows: Iterable[Row], tokenizer: Phi3Tokenizer, labels: Any, *, bad: BadRows
) -> Iterator[Example]:
    """Yields the examples of all rows; `labels` is the result of `task.label_set`.

    Raises:
        BadRowError: a row is bad, and `bad` does not skip it.
    """
    for row in rows:
        try:
            examples = task.encode(row, tokenizer, labels)
        except BadRowError as error:
            bad(error)
        else:
            yield from examples


def _inside(name: str) -> str:
    """Returns the tag that continues an entity."""
    return "I-" + name[2:] if name.startswith("B-") else name


def _marks_word_starts(tokenizer: Phi3Tokenizer) -> bool:
    """Whether a word alone has the same ids as a word after a space."""
    alone = tokenizer.encode("a", add_special_tokens=False)
    return tokenizer.encode("a a", add_special_tokens=False) == alone * 2


def _special_ids(tokenizer: Phi3Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer adds before and after a text."""
    alone, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next(at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
    return whole[:at], whole[at + len(alone) :]


def _surround(values: list[Any], fill: Any, before: Sequence[int], after: Sequence[int]) -> list[Any]:
    return [fill] * len(before) + values + [fill] * len(after)
