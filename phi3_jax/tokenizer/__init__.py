"""Turns text into ids and back: files of three kinds, chat templates, streams of ids.

It needs neither JAX nor transformers, so that data preparation and servers can use it alone.
"""

from ._backends import Backend, JsonBackend, SentencePieceBackend
from ._batching import BatchEncoding
from ._files import TOKENIZER_FILES
from ._stream import IncrementalDecoder
from ._tokenizer import Phi3Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "Backend",
    "BatchEncoding",
    "IncrementalDecoder",
    "JsonBackend",
    "Phi3Tokenizer",
    "SentencePieceBackend",
]
