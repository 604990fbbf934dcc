"""Back ends of the tokenizer: tokenizer.json with `tokenizers`, tokenizer.model with `sentencepiece`."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.runs.text import parse_json

from ._assemblers import PieceAssembler, TextAssembler, make_assembler

logger = logging.getLogger(__name__)

# A text ("A") and its pair ("B") with the ids of the special tokens around them, in order.
SpecialTokenLayout = tuple[int | Literal["A", "B"], ...]

# White space as the `tokenizers` library defines it; Python adds four control characters.
_WHITE_SPACE = "".join(chr(n) for n in range(0x3001) if chr(n).isspace() and not 0x1C <= n <= 0x1F)
_SPACES = re.compile(f"[{_WHITE_SPACE}]*")
_WORD = re.compile(r"\w")


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

    def layout(self, pair: bool) -> SpecialTokenLayout | None:
        """Returns the layout of special tokens around a text or a pair, or None if the file has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text without the special tokens around it."""
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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # the library raises nothing narrower
            parse_json(self._content, name)
            raise UserError(
                f"{name} is JSON, but not a tokenizer that `tokenizers` can read: {error}"
            ) from error
        # Phi3Tokenizer cuts and pads.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = self._tokenizer.decoder
        self._decoder = None if decoder is None else json.loads(decoder.__getstate__())
        self._read_added_tokens()

    def _read_added_tokens(self) -> None:
        self.added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self.added_tokens.items() if token.special)

    @property
    def file(self) -> tuple[str, bytes]:
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

    def layout(self, pair: bool) -> SpecialTokenLayout | None:
        if self._tokenizer.post_processor is None:
            return None
        probe = self._tokenizer.encode("a", "a") if pair else self._tokenizer.encode("a")
        layout: list[int | Literal["A", "B"]] = []
        for token_id, sequence in zip(probe.ids, probe.sequence_ids, strict=True):
            if sequence is None:
                layout.append(token_id)
            elif (part := "AB"[sequence]) not in layout:
                layout.append("A" if part == "A" else "B")
        complete = "A" in layout and ("B" in layout or not pair)
        return tuple(layout) if complete else None  # None: a vocabulary without "a"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i < 2**32], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id) if token_id < 2**32 else None

    def assembler(self) -> TextAssembler:
        return make_assembler(self._decoder, self._join)

    def _join(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)


class SentencePieceBackend:
    """The vocabulary of a tokenizer.model: SentencePiece between added tokens, with tokenizer.json's ids.

    Each part of a text between added tokens is a text of its own, and so begins with `▁`.

    Raises:
        UserError: `content` is not a SentencePiece model.
    """

    def __init__(self, content: bytes, name: str = "tokenizer.model") -> None:
        self._content = content
        if not content:  # the library accepts it, and then returns 0 for everything
            raise UserError(f"{name} is empty; expected a SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{name} is not a SentencePiece model, or is cut short: {error}") from error
        self.vocab_size = self._model.get_piece_size()
        self.added_tokens: dict[int, AddedToken] = {}
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

    def layout(self, pair: bool) -> SpecialTokenLayout | None:
        return None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        done = 0
        for match in self._added_pattern.finditer(text):
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
            ids += self._pieces(text[done:start])
            ids.append(token_id)
            done = stop
        return ids + self._pieces(text[done:])

    def _pieces(self, text: str) -> list[int]:
        return self._model.encode(text) if text else []

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
