"""Turns text into ids and back: tokenizer.json or tokenizer.model, chat templates, streams of ids.

It needs neither JAX nor transformers, so that data preparation and servers can use it alone.
"""

from ._backends import Backend, JsonBackend, SentencePieceBackend
from ._batching import BatchEncoding
from ._stream import IncrementalDecoder
from ._tokenizer import Phi3Tokenizer

__all__ = [
    "Backend",
    "BatchEncoding",
    "IncrementalDecoder",
    "JsonBackend",
    "Phi3Tokenizer",
    "SentencePieceBackend",
]
