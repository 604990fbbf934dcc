"""Tasks that turn rows into examples: classes of texts, classes of words, or the next token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

from phi3_jax.data.chat_examples import as_messages, encode_chat
from phi3_jax.data.columns import (
    are_words,
    check_characters,
    check_two_classes,
    collect_labels,
    errors_of,
    label_ids,
    label_names,
    read_list,
    read_number,
    read_text,
    read_value,
    read_zero_or_one,
)
from phi3_jax.data.encoding import Checked, Example, RowEncoder, encode_items, encode_row
from phi3_jax.data.labels import Labels
from phi3_jax.data.rows import BadRowError, BadRows, Row
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.tokenizer import Phi3Tokenizer

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


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
        self.texts(row)
        return [] if self.label is None or self.has_label_columns else self._names(row)

    def encode(self, row: Row, tokenizer: Phi3Tokenizer, labels: Labels) -> list[Example]:
        """Returns one example, with the ids of `tokenizer(text, text_pair, truncation=True)`.

        Raises:
            BadRowError: there is no text, or the label is missing, unknown or not a number.
        """
        return encode_row(row, self.encoder(tokenizer, labels), tokenizer)

    def encoder(self, tokenizer: Phi3Tokenizer, labels: Labels | None) -> RowEncoder:
        """Returns what `encode_items` takes; `labels` is None if rows are not labelled."""
        return _TextEncoder(self, tokenizer, labels)

    def texts(self, row: Row) -> tuple[str] | tuple[str, str]:
        """Returns the text of a row, or the pair."""
        text = read_text(row, self.text)
        if self.text_pair is None:
            return (text,)
        return text, read_text(row, self.text_pair, may_be_empty=True)

    def target(self, row: Row, labels: Labels | None) -> int | list[float] | None:
        """Returns the label of a row, or the number for each class or output."""
        if self.label is None:
            return None
        if self.problem_type == "regression":
            return [read_number(row, column) for column in self._label_columns]
        if isinstance(self.label, tuple):
            return [read_zero_or_one(row, column) for column in self.label]
        assert labels is not None
        chosen = label_ids(row, labels, self._names(row))
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
        _, names = self.words_and_names(row)
        assert names is not None
        return names + [_inside(name) for name in names] if self.label_all_pieces else names

    def encode(self, row: Row, tokenizer: Phi3Tokenizer, labels: Labels) -> list[Example]:
        """Returns one example, whose `firsts` are the tokens that predict their words' classes.

        Raises:
            BadRowError: there are no words, a word is empty, there is not one label for each word, or a label
                is unknown.
        """
        return encode_row(row, self.encoder(tokenizer, labels), tokenizer)

    def encoder(self, tokenizer: Phi3Tokenizer, labels: Labels | None) -> RowEncoder:
        """Returns what `encode_items` takes; `labels` is None if rows are not labelled."""
        return _WordEncoder(self, tokenizer, labels)

    def words_and_names(self, row: Row) -> tuple[list[str], list[str] | None]:
        """Returns the words of a row and their tags, if rows are labelled."""
        words = read_list(row, self.words)
        if not words:
            raise BadRowError(row.place, f"{self.words!r} is empty")
        if not are_words(words):
            for index, word in enumerate(words):
                if not isinstance(word, str) or not word.strip():
                    raise BadRowError(row.place, f"{self.words}[{index}] is {word!r:.40}; expected a word")
                check_characters(row, f"{self.words}[{index}]", word)
        if self.labels is None:
            return words, None
        names = label_names(row, self.labels, read_value(row, self.labels))
        if len(names) != len(words):
            raise BadRowError(row.place, f"{len(words)} words and {len(names)} labels; expected one for each")
        return words, names


@dataclass(frozen=True)
class CausalLM:
    """Predicts the next token of raw texts, of token ids, or of the assistant's answers in conversations.

    Beside its messages a row may have `tools`, descriptions of functions for the chat template.

    Args:
        messages: column of conversations, which the tokenizer's chat template formats; or None. Messages have
            `role` and `content`, or ShareGPT's `from` and `value`.
        text: column of raw texts, if `messages` and `input_ids` are None.
        input_ids: column of token ids in place of texts, which are used as they are; or None.
        max_length: truncates conversations; texts and ids continue in the next example.
        dummy_token_ids: ids that stand for no token, which no row may have as a label.
        vocab_size: the ids of rows must be below it; None: they are not checked.
    """

    messages: str | None = None
    text: str = "text"
    input_ids: str | None = None
    max_length: int = 1024
    dummy_token_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}; predicting the next token needs at least 2")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that rows must have."""
        return (self.messages or self.input_ids or self.text,)

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
        return encode_row(row, self.encoder(tokenizer, labels), tokenizer)

    def encoder(self, tokenizer: Phi3Tokenizer, labels: Labels | None = None) -> RowEncoder:
        """Returns what `encode_items` takes. Only texts are encoded together, not conversations."""
        if self.messages is None and self.input_ids is not None:
            return _IdsEncoder(self, self.input_ids)
        return _LongTextEncoder(self, tokenizer) if self.messages is None else _ChatEncoder(self, tokenizer)


TOOLS = "tools"
_NOT_READ = ("functions", "documents", "chat_template_kwargs")
"""Columns that other programs hand to the chat template."""

Task = SequenceClassification | TokenClassification | CausalLM


def encode_rows(
    task: Task,
    rows: Iterable[Row | BadRowError],
    tokenizer: Phi3Tokenizer,
    labels: Labels | None,
    *,
    bad: BadRows,
) -> Iterator[Example]:
    """Yields the examples of all rows; `labels` is the result of `task.label_set`.

    Raises:
        BadRowError: a row is bad, and `bad` does not skip it.
    """
    for _, result in encode_items(rows, task.encoder(tokenizer, labels), tokenizer):
        if isinstance(result, BadRowError):
            bad(result)
        else:
            yield from result


class _TextEncoder:
    def __init__(self, task: SequenceClassification, tokenizer: Phi3Tokenizer, labels: Labels | None):
        self._task, self._tokenizer, self._labels = task, tokenizer, labels
        self._room = task.max_length - tokenizer.num_special_tokens_to_add(task.text_pair is not None)

    def check(self, row: Row) -> Checked:
        return self._task.texts(row), self._task.target(row, self._labels)

    def examples(self, row: Row, target: Any, ids: Sequence[list[int]]) -> tuple[Example]:
        truncated = sum(map(len, ids)) > self._room
        with errors_of(row):
            whole = self._tokenizer.surround(*ids, max_length=self._task.max_length)
        return (Example(whole, target, row.place, truncated=truncated),)


class _WordEncoder:
    def __init__(self, task: TokenClassification, tokenizer: Phi3Tokenizer, labels: Labels | None):
        self._task, self._tokenizer, self._labels = task, tokenizer, labels
        self._space = " " if task.prefix_space and not _marks_word_starts(tokenizer) else ""
        self._before, self._after = _special_ids(tokenizer)
        self._room = task.max_length - len(self._before) - len(self._after)

    def check(self, row: Row) -> Checked:
        words, names = self._task.words_and_names(row)
        space = self._space
        return [words[0], *([space + word for word in words[1:]] if space else words[1:])], (words, names)

    def examples(self, row: Row, values: Any, ids: Sequence[list[int]]) -> tuple[Example]:
        words, names = values
        pieces = self._pieces(row, words, ids)
        targets = None if names is None else self._targets(row, names, pieces)
        before, after, room = self._before, self._after, self._room
        if room < 1:
            least = len(before) + len(after) + 1
            raise UserError(
                f"max_length={self._task.max_length} leaves no space for words; use {least} or more"
            )
        tokens = list(chain.from_iterable(pieces))
        count = len(tokens)
        from_right = self._tokenizer.truncation_side == "right"
        kept = slice(0, room) if from_right else slice(max(count - room, 0), count)
        example = Example(
            [*before, *tokens[kept], *after],
            None if targets is None else self._surround(targets[kept], IGNORE_INDEX),
            row.place,
            firsts=self._surround(_firsts(pieces)[kept], False),
            truncated=count > room,
        )
        return (example,)

    def _pieces(self, row: Row, words: Sequence[str], ids: Sequence[list[int]]) -> Sequence[list[int]]:
        """Returns the ids of each word, of which there is at least one."""
        if all(ids):
            return ids
        unk = self._tokenizer.unk_token_id
        if unk is None:
            word = next(word for word, piece in zip(words, ids, strict=True) if not piece)
            raise BadRowError(row.place, f"the tokenizer has no token for the word {word!r}")
        return [piece or [unk] for piece in ids]

    def _targets(self, row: Row, names: Sequence[str], pieces: Sequence[Sequence[int]]) -> list[int]:
        """Returns the label of each token."""
        assert self._labels is not None
        if self._task.label_all_pieces:
            both = label_ids(row, self._labels, [each for name in names for each in (_inside(name), name)])
            others, firsts = both[::2], both[1::2]
        else:
            firsts = label_ids(row, self._labels, names)
            others = [IGNORE_INDEX] * len(firsts)
        targets: list[int] = []
        for piece, first, other in zip(pieces, firsts, others, strict=True):
            targets.append(first)
            if len(piece) > 1:
                targets += [other] * (len(piece) - 1)
        return targets

    def _surround(self, values: list[Any], fill: Any) -> list[Any]:
        return [fill] * len(self._before) + values + [fill] * len(self._after)


class _LongTextEncoder:
    def __init__(self, task: CausalLM, tokenizer: Phi3Tokenizer):
        self._task, self._tokenizer = task, tokenizer

    def check(self, row: Row) -> Checked:
        text = read_text(row, self._task.text)
        return (text,), text

    def examples(self, row: Row, text: str, ids: Sequence[list[int]]) -> list[Example]:
        whole = list(self._tokenizer.surround(*ids))
        end = self._tokenizer.eos_token_id
        if end is not None and whole[-1:] != [end]:
            whole.append(end)
        if len(whole) < 2:
            raise BadRowError(
                row.place, f"{self._task.text!r} is a single token, which nothing predicts: {text!r:.40}"
            )
        return _parts(whole, self._task, row)


class _IdsEncoder:
    def __init__(self, task: CausalLM, column: str):
        self._task, self._column = task, column

    def check(self, row: Row) -> Checked:
        return (), read_list(row, self._column)

    def examples(self, row: Row, values: list[Any], ids: Sequence[list[int]]) -> list[Example]:
        vocabulary = self._task.vocab_size
        for value in values:
            if type(value) is not int or value < 0 or (vocabulary is not None and value >= vocabulary):
                below = "" if vocabulary is None else f" below {vocabulary}"
                raise BadRowError(row.place, f"{self._column!r} has {value!r:.40}; expected token ids{below}")
        if len(values) < 2:
            raise BadRowError(row.place, f"{self._column!r} is {values!r}; expected two token ids or more")
        return _parts(values, self._task, row)


def _parts(whole: list[int], task: CausalLM, row: Row) -> list[Example]:
    """Returns examples of at most `max_length` tokens; the last of one is the first of the next."""
    length = task.max_length
    _check_labels(whole, task, row)
    parts = [whole[start : start + length] for start in range(0, len(whole) - 1, length - 1)]
    return [Example(part, part, row.place) for part in parts]


class _ChatEncoder:
    """Encodes conversations one by one: what is a label depends on the texts of their parts."""

    def __init__(self, task: CausalLM, tokenizer: Phi3Tokenizer):
        self._task, self._tokenizer = task, tokenizer

    def check(self, row: Row) -> Checked:
        return (), None

    def examples(self, row: Row, values: None, ids: Sequence[list[int]]) -> tuple[Example]:
        assert self._task.messages is not None
        messages = read_list(row, self._task.messages)
        for column in _NOT_READ:
            if row.values.get(column):
                raise BadRowError(row.place, f"the column {column!r} is not read; remove it")
        tools = read_list(row, TOOLS) if row.values.get(TOOLS) else None
        with errors_of(row):
            chat = encode_chat(as_messages(messages), self._tokenizer, self._task.max_length, tools)
        own, targets, truncated = chat
        _check_labels(targets, self._task, row)
        return (Example(own, targets, row.place, truncated=truncated),)


def _check_labels(labels: Sequence[int], task: CausalLM, row: Row) -> None:
    """Raises a BadRowError if a label is the id of no token."""
    for token in task.dummy_token_ids and sorted({*labels} & {*task.dummy_token_ids}):
        raise BadRowError(row.place, f"the id {token} is to be predicted, and the model has no such token")


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


def _firsts(pieces: Iterable[Sequence[int]]) -> list[bool]:
    """Returns whether each token is the first of its word."""
    firsts: list[bool] = []
    for piece in pieces:
        firsts.append(True)
        if len(piece) > 1:
            firsts += [False] * (len(piece) - 1)
    return firsts
