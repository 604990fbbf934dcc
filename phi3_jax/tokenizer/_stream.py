"""Decodes ids as they arrive."""

from collections.abc import Iterable
from typing import Any, Protocol, SupportsIndex

from phi3_jax.errors import UserError

from ._backends import Backend


class HasBackend(Protocol):
    """The part of a tokenizer that decoding needs."""

    @property
    def backend(self) -> Backend: ...


class IncrementalDecoder:
    """Decodes ids as they arrive: the texts of all `put`s and of `end` add up to `tokenizer.decode(all ids)`.

    Text that was returned never changes. An unfinished UTF-8 character waits, and with SentencePiece's byte
    fallback a whole run of byte pieces (newline is one), until another piece ends it.
    """

    def __init__(self, tokenizer: HasBackend, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer.backend
        self._skipped = self._backend.special_ids if skip_special_tokens else frozenset()
        self._assembler = self._backend.assembler()

    def put(self, ids: SupportsIndex | Iterable[SupportsIndex]) -> str:
        """Takes one id, or several in order; returns the text that is now certain, often none."""
        tokens = (self._backend.id_to_token(i) for i in as_ids(ids) if i not in self._skipped)
        return "".join(self._assembler.put(token) for token in tokens if token is not None)

    def end(self) -> str:
        """Returns the text that was still waiting, and resets the decoder."""
        text = self._assembler.end()
        self._assembler = self._backend.assembler()
        return text


def as_ids(ids: Any) -> list[int]:
    """Returns one id or a one-dimensional sequence of them (list, NumPy or JAX array) as a list of ints.

    Raises:
        TypeError: a value is not an integer. UserError: an id is negative, or there is more than one axis.
    """
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"expected token ids, got {type(ids).__name__} {ids!r:.40}")
    if hasattr(ids, "tolist"):
        if getattr(ids, "ndim", 1) > 1:
            raise UserError(
                f"expected one row of token ids, got shape {ids.shape}; use batch_decode for a batch"
            )
        ids = ids.tolist()
    items = list(ids) if isinstance(ids, Iterable) else [ids]
    result = []
    for item in items:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(f"token ids must be integers, got {type(item).__name__} {item!r:.40}")
        number = item.__index__()
        if number < 0:
            raise UserError(f"token ids cannot be negative, got {number} (a label's -100 has no text)")
        result.append(number)
    return result
