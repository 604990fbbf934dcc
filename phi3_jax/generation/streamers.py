"""Where tokens go while they are made: `put` gets the prompt [1, T] first, then each new token [1].

`end` tells that it was the last. Any object with these two methods is a streamer.
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
    """What a streamer must have."""

    def put(self, value: Any) -> None:
        """Takes the prompt, or new tokens."""
        raise NotImplementedError(f"{type(self).__name__} needs a method put(value)")

    def end(self) -> None:
        """Hears that no more tokens come; the next `put` is another prompt."""
        raise NotImplementedError(f"{type(self).__name__} needs a method end()")


class TextStreamer(BaseStreamer):
    """Prints one row's text as it becomes certain, and a newline at its end.

    To do something else with the text, override `on_finalized_text`. All its texts up to the end together are
    what `tokenizer.decode` makes of the tokens at once; an unfinished character waits for its last byte.
    """

    def __init__(self, tokenizer: Phi3Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        """`skip_special_tokens`, False unless given, is the one option of decoding.

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
            ValueError: there are more rows.
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
        """Gives out what was held back."""
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self._decoder.end(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints, in process 0; `text` is never empty but at the end, where it may be."""
        if is_primary():
            print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Hands the text to another thread, which iterates over this object while `generate` runs.

    It ends where the answer ends, and may then be used for the next one.
    """

    def __init__(
        self,
        tokenizer: Phi3Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        """`timeout` seconds without a text raise `queue.Empty` in the reader; None waits for ever."""
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
