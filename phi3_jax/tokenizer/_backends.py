"""Back ends of the tokenizer: tokenizer.json with `tokenizers`, tokenizer.model with `sentencepiece`."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.runs.panics import panics_as_errors
from phi3_jax.runs.text import parse_json

from ._assemblers import _BYTE_PIECE, PieceAssembler, TextAssembler, make_assembler
from ._growth import MOST_IDS, check_growth, check_ids, check_model_growth

logger = logging.getLogger(__name__)

# A text ("A") and its pair ("B") with the ids of the special tokens around them, in order.
SpecialTokenLayout = tuple[int | Literal["A", "B"], ...]

# White space as the `tokenizers` library defines it; Python adds four control characters.
_WHITE_SPACE = "".join(chr(n) for n in range(0x3001) if chr(n).isspace() and not 0x1C <= n <= 0x1F)
_SPACES = re.compile(f"[{_WHITE_SPACE}]*")
_WORD = re.compile(r"\w")


class Pieces(NamedTuple):
    """The ids of a text with what is known of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """The characters that each stands for: start and stop in the text, or in its word."""
    words: list[int | None]
    """The number of the word that each belongs to; without given words, of the part between added tokens."""


class Backend(Protocol):
    """A vocabulary of pieces and of added tokens, which are cut out of a text before it is split."""

    @property
    def file(self) -> tuple[str, bytes]:
        """The name and the content of the vocabulary's file."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of pieces, without added tokens."""
        ...

    @property
    def added_tokens(self) -> Mapping[int, AddedToken]: ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` drops."""
        ...

    def __len__(self) -> int: ...

    def add_tokens(self, tokens: Mapping[int, AddedToken]) -> None:
        """Makes these ids added tokens, or changes their flags."""
        ...

    def extend(self, tokens: Sequence[AddedToken]) -> int:
        """Adds tokens after all others, or makes pieces added tokens; returns how many were not added before.

        `file` then has them.
        """
        ...

    def vocabulary(self) -> dict[str, int]:
        """Returns the id of every token."""
        ...

    def layout(self, pair: bool) -> SpecialTokenLayout | None:
        """Returns the layout of special tokens around a text or a pair, or None if the file has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text without the special tokens around it."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text as `encode` does, on all cores."""
        ...

    def pieces(self, text: str | Sequence[str], split_special: bool = False) -> Pieces:
        """Returns the ids of a text, or of its words, without the special tokens around it.

        With `split_special`, special tokens within the text are text like any other.

        Raises:
            UserError: the vocabulary changes texts so that offsets are unknown.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; ids without a token give none."""
        ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def assembler(self) -> TextAssembler: ...


class JsonBackend:
    """The vocabulary of a tokenizer.json, with its normalizer, splitting, special tokens and decoder.

    Raises:
        UserError: `content` is not JSON (with the position), or not a tokenizer.
    """

    def __init__(self, content: str | bytes, name: str = "tokenizer.json") -> None:
        self._content = content.encode("utf-8") if isinstance(content, str) else content
        check_ids(name, self._content)
        try:
            with panics_as_errors(name):
                self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # the library raises nothing narrower
            parse_json(self._content, name)
            raise UserError(
                f"{name} is JSON, but not a tokenizer that `tokenizers` can read: {error}"
            ) from error
        self._name = name
        self._extended = False
        # Phi3Tokenizer cuts and pads.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._decoder = _section(self._tokenizer.decoder)
        steps = {
            "normalizer": _section(self._tokenizer.normalizer),
            "pre_tokenizer": _section(self._tokenizer.pre_tokenizer),
            "decoder": self._decoder,
        }
        check_growth(name, steps)
        self._read_added_tokens()

    @cached_property
    def _splitting(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for texts whose special tokens are split."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def _read_added_tokens(self) -> None:
        self.__dict__.pop("_splitting", None)
        self.added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self.added_tokens.items() if token.special)

    @property
    def file(self) -> tuple[str, bytes]:
        if self._extended:
            return "tokenizer.json", self._tokenizer.to_str(pretty=True).encode("utf-8")
        return "tokenizer.json", self._content

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def add_tokens(self, tokens: Mapping[int, AddedToken]) -> None:
        for token_id, token in sorted(tokens.items()):
            known = self._tokenizer.token_to_id(token.content)
            # `tokenizers` chooses ids itself, in order; a token that would get another id is left out.
            if known != token_id and not (known is None and token_id == len(self)):
                logger.warning(
                    "token %r left out: its config says id %d, tokenizer.json says %s",
                    token.content,
                    token_id,
                    known,
                )
            elif repr(token) != repr(self.added_tokens.get(token_id)):
                self._tokenizer.add_tokens([token])
        self._read_added_tokens()

    def extend(self, tokens: Sequence[AddedToken]) -> int:
        with panics_as_errors(self._name):
            # The library takes special tokens by another method.
            added = sum(
                (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([token])
                for token in tokens
            )
        self._extended = True
        self._read_added_tokens()
        return added

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def layout(self, pair: bool) -> SpecialTokenLayout | None:
        if self._tokenizer.post_processor is None:
            return None
        with panics_as_errors(self._name):
            probe = self._tokenizer.encode("a", "a") if pair else self._tokenizer.encode("a")
        layout: list[int | Literal["A", "B"]] = []
        for token_id, sequence in zip(probe.ids, probe.sequence_ids, strict=True):
            if sequence is None:
                if token_id >= MOST_IDS:
                    raise UserError(
                        f"{self._name}: its post_processor adds the id {token_id}, which is no token"
                    )
                layout.append(token_id)
            elif (part := "AB"[sequence]) not in layout:
                layout.append("A" if part == "A" else "B")
        complete = "A" in layout and ("B" in layout or not pair)
        return tuple(layout) if complete else None  # None: a vocabulary without "a"

    def encode(self, text: str) -> list[int]:
        with panics_as_errors(self._name):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with panics_as_errors(self._name):
            # "fast" leaves out the offsets.
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [each.ids for each in found]

    def pieces(self, text: str | Sequence[str], split_special: bool = False) -> Pieces:
        words = not isinstance(text, str)
        tokenizer = self._splitting if split_special else self._tokenizer
        with panics_as_errors(self._name):
            found = tokenizer.encode(text, is_pretokenized=words, add_special_tokens=False)
        return Pieces(found.ids, found.offsets, found.word_ids)

    def decode(self, ids: Sequence[int]) -> str:
        with panics_as_errors(self._name):
            return self._tokenizer.decode([i for i in ids if i < 2**32], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id) if token_id < 2**32 else None

    def assembler(self) -> TextAssembler:
        return make_assembler(self._decoder, self._join)

    def _join(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        with panics_as_errors(self._name):
            return " ".join(tokens) if decoder is None else decoder.decode(tokens)


def _section(part: Any) -> dict[str, Any] | None:
    """Returns a section of tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


class SentencePieceBackend:
    """The vocabulary of a tokenizer.model: SentencePiece between added tokens, with tokenizer.json's ids.

    Each part of a text between added tokens is a text of its own, and so begins with `▁`.

    Raises:
        UserError: `content` is not a SentencePiece model.
    """

    def __init__(self, content: bytes, name: str = "tokenizer.model") -> None:
        self._content, self._name = content, name
        if not content:  # the library accepts it, and then returns 0 for everything
            raise UserError(f"{name} is empty; expected a SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter if its own message cannot be read
            raise UserError(f"{name} is not a SentencePiece model, or is cut short: {error}") from error
        check_model_growth(name, content)
        self.vocab_size = self._model.get_piece_size()
        self.added_tokens: dict[int, AddedToken] = {}
        try:
            self._model.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError as error:
            raise UserError(f"{name} holds a piece that is not valid UTF-8: {error.object!r:.60}") from error
        control = (
            i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)
        )
        self.add_tokens(
            {i: AddedToken(self._model.id_to_piece(i), special=True, normalized=False) for i in control}
        )

    @property
    def file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._content

    @property
    def named_tokens(self) -> dict[str, str]:
        """Those of bos_token, eos_token, unk_token and pad_token that the model has."""
        names = ("bos", "eos", "unk", "pad")
        ids = {name: getattr(self._model, f"{name}_id")() for name in names}
        return {f"{name}_token": self._model.id_to_piece(i) for name, i in ids.items() if i >= 0}

    def __len__(self) -> int:
        return self.vocab_size + sum(i >= self.vocab_size for i in self.added_tokens)

    def add_tokens(self, tokens: Mapping[int, AddedToken]) -> None:
        for token_id, token in tokens.items():
            if token_id < self.vocab_size and (piece := self._model.id_to_piece(token_id)) != token.content:
                raise UserError(
                    f"added token {token.content!r} has id {token_id}, which is the piece {piece!r}"
                )
            self.added_tokens[token_id] = token
        self.special_ids = frozenset(i for i, token in self.added_tokens.items() if token.special)
        self._added_ids = {token.content: i for i, token in self.added_tokens.items()}
        # The first alternative that matches wins, so the longest comes first.
        contents = sorted(self._added_ids, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        plain = [content for content in contents if not self.added_tokens[self._added_ids[content]].special]
        self._plain_pattern = re.compile("|".join(map(re.escape, plain)) or r"(?!)")

    def extend(self, tokens: Sequence[AddedToken]) -> int:
        # As with `tokenizers`: a token without text, or one that is added already, does not count.
        news: dict[int, AddedToken] = {}
        last = max(self.vocab_size - 1, *self.added_tokens)
        for token in tokens:
            # It is cut out of the text as it is written: the text is changed within SentencePiece only.
            flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "special")}
            token = AddedToken(token.content, normalized=False, **flags)
            token_id = self.token_to_id(token.content)
            token_id = next((i for i, new in news.items() if new.content == token.content), token_id)
            known = news.get(token_id, self.added_tokens.get(token_id)) if token_id is not None else None
            if token.content and repr(known) != repr(token):
                last += token_id is None
                news[last if token_id is None else token_id] = token
        self.add_tokens(news)
        return len(news)

    def vocabulary(self) -> dict[str, int]:
        pieces = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        return pieces | {token.content: i for i, token in self.added_tokens.items()}

    def layout(self, pair: bool) -> SpecialTokenLayout | None:
        return None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start, stop, token_id in self._parts(text):
            ids += self._model.encode(text[start:stop]) if token_id is None else [token_id]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [list(self._parts(text)) for text in texts]
        between = [
            text[start:stop]
            for text, of_text in zip(texts, parts, strict=True)
            for start, stop, token_id in of_text
            if token_id is None
        ]
        encoded = iter(self._model.encode(between))
        return [
            [i for _, _, token in of_text for i in (next(encoded) if token is None else (token,))]
            for of_text in parts
        ]

    def pieces(self, text: str | Sequence[str], split_special: bool = False) -> Pieces:
        found = Pieces([], [], [])
        if not isinstance(text, str):
            for number, word in enumerate(text):
                ids, offsets, _ = self.pieces(word, split_special)
                found.ids.extend(ids)
                found.offsets.extend(offsets)
                found.words.extend([number] * len(ids))
            return found
        for number, (start, stop, token_id) in enumerate(self._parts(text, split_special)):
            ids = self._model.encode(text[start:stop]) if token_id is None else [token_id]
            found.ids.extend(ids)
            offsets = self._offsets(text[start:stop], ids) if token_id is None else [(0, stop - start)]
            found.offsets.extend((start + first, start + end) for first, end in offsets)
            found.words.extend([number] * len(ids))
        return found

    def _offsets(self, part: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Returns the characters of each piece; the first one begins with a `▁` that is no character."""
        offsets: list[tuple[int, int]] = []
        at, of_bytes = -1, 0
        for token in map(self._model.id_to_piece, ids):
            if _BYTE_PIECE.fullmatch(token) is None:
                offsets.append((max(at, 0), max(at + len(token), 1)))
                at += len(token)
                continue
            at, of_bytes = max(at, 0), of_bytes + 1
            if of_bytes == len(part[at : at + 1].encode()):  # the last byte of a character
                offsets += [(at, at + 1)] * of_bytes
                at, of_bytes = at + 1, 0
        if at != len(part) or of_bytes:
            raise UserError(
                f"{self._name} changes texts before it splits them, so that their offsets are unknown; use a "
                "tokenizer.json"
            )
        return offsets

    def _parts(self, text: str, split_special: bool = False) -> Iterator[tuple[int, int, int | None]]:
        """Yields the start and the stop of each added token, with its id, and of the texts between them."""
        done = 0
        pattern = self._plain_pattern if split_special else self._added_pattern
        for match in pattern.finditer(text):
            start, stop = match.span()
            token_id = self._added_ids[match[0]]
            token = self.added_tokens[token_id]
            inside_word = (start > 0 and _WORD.match(text, start - 1)) or _WORD.match(text, stop)
            if token.single_word and inside_word:
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip(_WHITE_SPACE))
            if token.rstrip and (spaces := _SPACES.match(text, stop)):
                stop = spaces.end()
            if start > done:
                yield done, start, None
            yield start, stop, token_id
            done = stop
        if len(text) > done:
            yield done, len(text), None

    def decode(self, ids: Sequence[int]) -> str:
        assembler = self.assembler()
        tokens = (self.id_to_token(i) for i in ids)
        return "".join([assembler.put(token) for token in tokens if token is not None]) + assembler.end()

    def token_to_id(self, token: str) -> int | None:
        if (added := self._added_ids.get(token)) is not None:
            return added
        piece_id = self._model.piece_to_id(token)
        return piece_id if self._model.id_to_piece(piece_id) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        if (added := self.added_tokens.get(token_id)) is not None:
            return added.content
        return self._model.id_to_piece(token_id) if token_id < self.vocab_size else None

    def assembler(self) -> TextAssembler:
        return PieceAssembler()
