"""When to stop, judged on the host between two steps of the device: each criterion answers for every row."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

# What a token's characters or its <0xNN> stand for is the assemblers' knowledge; there is one copy of it.
from phi3_jax.tokenizer._assemblers import _BYTE_OF_CHARACTER, _BYTE_PIECE, ByteLevelAssembler


class StoppingCriteria(Protocol):
    """Looks at all the tokens so far, prompt and padding included, and says which rows are done.

    Any callable of this kind serves. `generate` gives None as `scores`. Where several processes compute one
    model, only process 0 is asked, and its answer counts in all.
    """

    def __call__(
        self, input_ids: Int[np.ndarray, "R T"], scores: Any, **kwargs: Any
    ) -> Bool[np.ndarray, " R"]:
        """True where the row's latest token is its last; one bool counts for every row."""
        ...


class StoppingCriteriaList(list[StoppingCriteria]):
    """Criteria of which one is enough.

    Raises:
        TypeError: a criterion answered with something else than bools. ValueError: not with one for each row.
    """

    def __call__(self, input_ids: Int[np.ndarray, "R T"], scores: Any = None, **kwargs: Any) -> np.ndarray:
        rows = len(input_ids)
        done = np.zeros(rows, bool)
        for criterion in self:
            done |= _answer(criterion, criterion(input_ids, scores, **kwargs), rows)
        return done  # [R]


def _answer(criterion: StoppingCriteria, answer: Any, rows: int) -> np.ndarray:
    """A criterion's answer (a bool, a list or any library's array) as NumPy bools [R]."""
    name = getattr(criterion, "__name__", type(criterion).__name__)
    found = np.asarray(answer.cpu() if hasattr(answer, "cpu") else answer)
    if found.dtype != bool:
        said = repr(answer) if found.ndim == 0 else f"an array of {found.dtype}"
        raise TypeError(f"stopping criterion {name} answered {said}; expected a bool, or one for each row")
    if found.shape not in ((), (rows,)):
        raise UserError(
            f"stopping criterion {name} answered with shape {found.shape}; expected one bool, or shape "
            f"({rows},): one for each row"
        )
    return np.broadcast_to(found, (rows,))


class MaxTimeCriteria:
    """Stops every row once `max_time` seconds have passed since `initial_timestamp` (by default: now)."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        """`initial_timestamp` is a `time.time()`."""
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Int[np.ndarray, "R T"], scores: Any = None, **kwargs: Any) -> np.ndarray:
        return np.full(len(input_ids), time.time() - self.initial_timestamp > self.max_time)


class StopStringCriteria:
    """Stops a row whose latest token completes one of the texts, wherever the tokens' borders lie.

    The match must end inside the latest token and may begin anywhere, in the prompt too; what was complete
    before that token does not count. Tokens are compared as the bytes of their text, special tokens as their
    names, and a SentencePiece `▁` is a space even where decoding drops it: the reference's rules
    (`generation/stopping_criteria.py`). A call looks at as many tokens as the longest text has bytes, at most
    (tokens without text apart).

    Raises:
        ValueError: no text, or one that is empty or no Unicode. TypeError: something is no text.
    """

    def __init__(self, tokenizer: Phi3Tokenizer, stop_strings: str | Sequence[str]) -> None:
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self._stops = [_stop_bytes(text) for text in self.stop_strings]
        if not self._stops:
            raise UserError("stop_strings is empty; give at least one text, or None for no stop strings")
        self._longest = max(map(len, self._stops))
        self._tokens = _TokenBytes(tokenizer)

    def __call__(self, input_ids: Int[np.ndarray, "R T"], scores: Any = None, **kwargs: Any) -> np.ndarray:
        return np.fromiter(map(self.completed, input_ids), bool, len(input_ids))

    def completed(self, row: Sequence[int] | Int[np.ndarray, " T"]) -> bool:
        """Whether the last of these tokens completes one of the texts."""
        if not len(row):
            return False
        latest = self._tokens[int(row[-1])]
        before = b""
        for index in range(len(row) - 2, -1, -1):
            if len(before) >= self._longest - 1:
                break
            before = self._tokens[int(row[index])] + before
        text = before + latest
        return any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in self._stops)


def _stop_bytes(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"stop_strings holds {type(text).__name__} {text!r:.40}; expected texts (str)")
    if not text:
        raise UserError("stop_strings holds an empty text, which every token completes; leave it out")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"stop_strings holds {text!r}, which is no Unicode: {error.reason}") from error


class _TokenBytes(dict[int, bytes]):
    """Id -> the bytes that the token adds to a text that has begun; found out when first asked for."""

    def __init__(self, tokenizer: Phi3Tokenizer) -> None:
        super().__init__()
        self._backend = tokenizer.backend
        self._byte_level = isinstance(self._backend.assembler(), ByteLevelAssembler)
        self._byte_fallback = self._assembled(["<0x41>"]) == "A"
        begun = (self._backend.id_to_token(i) for i in self._backend.encode("a"))
        self._begun = [token for token in begun if token is not None]
        self._begun_text = self._assembled(self._begun)

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        self[token_id] = b"" if token is None else self._bytes(token)
        return self[token_id]

    def _bytes(self, token: str) -> bytes:
        if self._byte_level and _BYTE_OF_CHARACTER.keys() >= set(token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        text = self._assembled([*self._begun, token])
        return text.removeprefix(self._begun_text).encode("utf-8")

    def _assembled(self, tokens: Sequence[str]) -> str:
        assembler = self._backend.assembler()
        return "".join([assembler.put(token) for token in tokens]) + assembler.end()
