"""Assemblers, which turn tokens into text one by one.

An assembler returns the text that no later token can change. The work per token is constant, and the pieces
add up to the text of all tokens decoded at once.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PIECEWISE = re.compile(r"(Replace )*(ByteFallback )?(Fuse )?((?<=Fuse )Strip )?")


class TextAssembler(Protocol):
    """Assembles the text of a token sequence, token by token."""

    def put(self, token: str) -> str:
        """Takes a token; returns the text that becomes certain: none, or that of several tokens."""
        ...

    def end(self) -> str:
        """Returns the text that was still uncertain."""
        ...


class PieceAssembler:
    """Assembles SentencePiece text: `▁` is a space, `<0xNN>` a byte, and the first space is dropped.

    A run of byte pieces is either valid UTF-8 as a whole or one U+FFFD per byte (the rule of the `tokenizers`
    library), so its text is certain only when the run ends.
    """

    def __init__(
        self,
        replacements: Iterable[tuple[str, str]] = (("▁", " "),),
        byte_fallback: bool = True,
        strip: tuple[str, int] = (" ", 1),
    ) -> None:
        self._replacements = tuple(replacements)
        self._byte_fallback = byte_fallback
        self._strip, self._strips_left = strip
        self._bytes = bytearray()

    def put(self, token: str) -> str:
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(token)):
            self._bytes.append(int(byte[1], 16))
            return ""
        return self._without_prefix(self._byte_run() + token)

    def end(self) -> str:
        return self._without_prefix(self._byte_run())

    def _byte_run(self) -> str:
        run, self._bytes = self._bytes, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _without_prefix(self, text: str) -> str:
        while self._strips_left and text:
            if not text.startswith(self._strip):
                self._strips_left = 0
            else:
                text = text[len(self._strip) :]
                self._strips_left -= 1
        return text


class ByteLevelAssembler:
    """Assembles GPT-2 text: each character of a token is one byte; invalid UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token: str) -> str:
        try:
            raw = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token in plain text
            raw = token.encode("utf-8")
        return self._decoder.decode(raw)

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class WholeAssembler:
    """Decodes everything at the end, for decoders whose later tokens may change any earlier text."""

    def __init__(self, join: Callable[[list[str]], str]) -> None:
        self._join = join
        self._tokens: list[str] = []

    def put(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def end(self) -> str:
        tokens, self._tokens = self._tokens, []
        return self._join(tokens) if tokens else ""


def make_assembler(decoder: Mapping[str, Any] | None, join: Callable[[list[str]], str]) -> TextAssembler:
    """Returns the assembler for tokenizer.json's `decoder` section; `join` decodes a whole list of tokens."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelAssembler()
    replaces = [step for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    understood = (
        bool(kinds)
        and _PIECEWISE.fullmatch("".join(f"{kind} " for kind in kinds)) is not None
        and all("String" in step["pattern"] for step in replaces)
        and all(step["stop"] == 0 for step in strips)
    )
    if not understood:
        return WholeAssembler(join)
    return PieceAssembler(
        replacements=[(step["pattern"]["String"], step["content"]) for step in replaces],
        byte_fallback="ByteFallback" in kinds,
        strip=(strips[0]["content"], strips[0]["start"]) if strips else ("", 0),
    )


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's table: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
