"""Streamers receive tokens during generation: `put` gets the prompt [1, T] first, then each new token [1].

`end` follows the last token. Any object with these two methods is a streamer.
"""

from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.parallel.distributed import is_primary
from phi3_jax.tokenizer import IncrementalDecoder, Phi3Tokenizer

_DECODE_OPTIONS = ("skip_special_tokens",)


class BaseStreamer:
    """The interface of a streamer."""

    def put(self, value: Any) -> None:
        """Takes the prompt, or new tokens."""
        raise NotImplementedError(f"{type(self).__name__} needs a method put(value)")

    def end(self) -> None:
        """Ends the answer; the next `put` is another prompt."""
        raise NotImplementedError(f"{type(self).__name__} needs a method end()")


class TextStreamer(BaseStreamer):
    """Prints one row's text as it becomes certain, and a newline at its end.

    To do something else with the text, override `on_finalized_text`. Its texts, joined, are equal to
    `tokenizer.decode` of all tokens; an unfinished character waits for its last byte.
    """

    def __init__(self, tokenizer: Phi3Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        """`skip_special_tokens` (default: False) is the only option of decoding.

        Raises:
            TypeError: any other option.
        """
        for option in decode_kwargs.keys() - set(_DECODE_OPTIONS):
            raise TypeError(
                f"{type(self).__name__} has no option {option}={decode_kwargs[option]!r}; decoding takes "
                f"{', '.join(_DECODE_OPTIONS)}"
            )
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self.next_tokens_are_prompt = True
        self._decoder: IncrementalDecoder = tokenizer.stream(**{"skip_special_tokens": False} | decode_kwargs)

    def put(self, value: Any) -> None:
        """Takes one row of ids, [T] or [1, T], in any library's array or as a list.

        Raises:
            UserError: there are more rows.
        """
        ids = np.asarray(value)
        if ids.ndim > 2 or (ids.ndim == 2 and len(ids) > 1):
            raise UserError(
                f"{type(self).__name__} takes one row of tokens, got shape {ids.shape}; generate one prompt "
                "at a time, or without a streamer"
            )
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        if text := self._decoder.put(ids.reshape(-1)):
            self.on_finalized_text(text)

    def end(self) -> None:
        """Finalizes the remaining text."""
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self._decoder.end(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints `text` in process 0; only the last one may be empty."""
        if is_primary():
            print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Passes the text to another thread, which iterates over this object while `generate` runs.

    The iteration ends with the answer; the object may then be used for the next one.
    """

    def __init__(
        self,
        tokenizer: Phi3Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        """After `timeout` seconds without text the reader gets `queue.Empty`; None waits forever."""
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: Queue[str | None] = Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queues the text."""
        if text:
            self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(self.stop_signal)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self.text_queue.get(timeout=self.timeout)
        if text is self.stop_signal:
            raise StopIteration
        return text
