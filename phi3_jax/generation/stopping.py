"""Stopping criteria: they decide on the host, between two steps of the device, which rows end."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

# The assemblers know which bytes a token's characters or its <0xNN> stand for.
from phi3_jax.tokenizer._assemblers import _BYTE_OF_CHARACTER, _BYTE_PIECE, ByteLevelAssembler


class StoppingCriteria(Protocol):
    """Any callable that decides from all tokens, prompt and padding included, which rows end.

    `generate` passes None as `scores`. Where several processes compute one model, only process 0 calls the
    criteria; its result holds for all.
    """

    def __call__(
        self, input_ids: Int[np.ndarray, "R T"], scores: Any, **kwargs: Any
    ) -> Bool[np.ndarray, " R"]:
        """Returns True where the row's latest token is its last; one bool counts for every row."""
        ...


class StoppingCriteriaList(list[StoppingCriteria]):
    """Ends a row as soon as one of the criteria does.

    Raises:
        TypeError: a criterion returned something else than bools.
        UserError: it returned neither one bool nor one for each row.
    """

    def __call__(self, input_ids: Int[np.ndarray, "R T"], scores: Any = None, **kwargs: Any) -> np.ndarray:
        rows = len(input_ids)
        done = np.zeros(rows, bool)
        for criterion in self:
            done |= _as_bools(criterion, criterion(input_ids, scores, **kwargs), rows)
        return done  # [R]

    def stopped(self, rows: Sequence[Sequence[int]], input_ids: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns which rows end, given each row's tokens and a function that returns them as one array.

        The function is called only for a user's criteria: those of this module read a few tokens of a row.
        """
        own, users = StoppingCriteriaList(), StoppingCriteriaList()
        for criterion in self:
            (own if type(criterion) in (MaxTimeCriteria, StopStringCriteria) else users).append(criterion)
        ours: Any = rows
        return own(ours) | users(input_ids()) if users else own(ours)


class JoinedTokens(Sequence[int]):
    """A row's prompt and new tokens as one sequence, without a copy."""

    def __init__(self, prompt: Sequence[int] | Int[np.ndarray, " n"], new: Sequence[int]):
        self._prompt, self._new = prompt, new

    def __len__(self) -> int:
        return len(self._prompt) + len(self._new)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return self._prompt[index] if index < len(self._prompt) else self._new[index - len(self._prompt)]


def _as_bools(criterion: StoppingCriteria, result: Any, rows: int) -> np.ndarray:
    """Returns a criterion's result (a bool, a list or any library's array) as NumPy bools [R]."""
    name = getattr(criterion, "__name__", type(criterion).__name__)
    bools = np.asarray(result.cpu() if hasattr(result, "cpu") else result)
    if bools.dtype != bool:
        got = repr(result) if bools.ndim == 0 else f"an array of {bools.dtype}"
        raise TypeError(f"stopping criterion {name} returned {got}; expected a bool, or one for each row")
    if bools.shape not in ((), (rows,)):
        raise UserError(
            f"stopping criterion {name} returned shape {bools.shape}; expected one bool, or shape ({rows},): "
            "one for each row"
        )
    return np.broadcast_to(bools, (rows,))


class MaxTimeCriteria:
    """Stops every row once `max_time` seconds have passed since `initial_timestamp` (by default: now)."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        """`initial_timestamp` is a `time.time()`."""
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Any, scores: Any = None, **kwargs: Any) -> np.ndarray:
        return np.full(len(input_ids), time.time() - self.initial_timestamp > self.max_time)


class StopStringCriteria:
    """Stops a row whose latest token completes one of the texts, wherever the tokens' borders lie.

    The match must end inside the latest token and may begin anywhere, in the prompt too; a text that was
    complete before that token does not count. Tokens are compared as the bytes of their text, special tokens
    as their names, and a SentencePiece `▁` is a space even where decoding drops it: the reference's rules
    (`generation/stopping_criteria.py`). A call reads at most as many tokens as the longest text has bytes,
    not counting tokens without text.

    Raises:
        UserError: there is no text, or one is empty or not valid Unicode. TypeError: one is not a str.
    """

    def __init__(self, tokenizer: Phi3Tokenizer, stop_strings: str | Sequence[str]) -> None:
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self._stops = [_stop_bytes(text) for text in self.stop_strings]
        if not self._stops:
            raise UserError("stop_strings is empty; give at least one text, or None for no stop strings")
        self._longest = max(map(len, self._stops))
        self._tokens = _TokenBytes(tokenizer)

    def __call__(self, input_ids: Any, scores: Any = None, **kwargs: Any) -> np.ndarray:
        return np.fromiter(map(self.completed, input_ids), bool, len(input_ids))

    def completed(self, row: Sequence[int] | Int[np.ndarray, " T"]) -> bool:
        """Returns whether the last of these tokens completes one of the texts."""
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
        raise UserError(f"stop_strings holds {text!r}, which is not valid Unicode: {error.reason}") from error


class _TokenBytes(dict[int, bytes]):
    """Maps a token id to the bytes that it adds after other text; computed on first use."""

    def __init__(self, tokenizer: Phi3Tokenizer) -> None:
        super().__init__()
        self._backend = tokenizer.backend
        self._byte_level = isinstance(self._backend.assembler(), ByteLevelAssembler)
        self._byte_fallback = self._assemble(["<0x41>"]) == "A"
        prefix = (self._backend.id_to_token(i) for i in self._backend.encode("a"))
        self._prefix = [token for token in prefix if token is not None]
        self._prefix_text = self._assemble(self._prefix)

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        self[token_id] = b"" if token is None else self._bytes(token)
        return self[token_id]

    def _bytes(self, token: str) -> bytes:
        if self._byte_level and _BYTE_OF_CHARACTER.keys() >= set(token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        if self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        text = self._assemble([*self._prefix, token])
        return text.removeprefix(self._prefix_text).encode("utf-8")

    def _assemble(self, tokens: Sequence[str]) -> str:
        assembler = self._backend.assembler()
        return "".join([assembler.put(token) for token in tokens]) + assembler.end()
