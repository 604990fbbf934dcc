"""Perplexity and bits per byte of a file of texts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss, windows
from phi3_jax.evaluation.score_all import Part, score_all
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.evaluation.texts import first_tokens, read_text
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.progress import FileProgress
from phi3_jax.runs.text import parse_json
from phi3_jax.tokenizer import Phi3Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on texts, and their sizes."""

    loss: TextLoss
    documents: int
    bytes: int
    """Bytes of the texts in UTF-8, without the first token of each, which is not predicted (unless it is a
    special token)."""
    words: int
    """Words of the texts, between white space."""
    length: int
    stride: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the sizes and the rates derived from them, for JSON."""
        loss, tokens = self.loss.loss, self.loss.tokens
        return {
            "perplexity": self.loss.perplexity,
            "word_perplexity": TextLoss(loss, self.words).perplexity,
            "bits_per_byte": loss / math.log(2) / self.bytes,
            "loss": loss / tokens,
            "documents": self.documents,
            "tokens": tokens,
            "words": self.words,
            "bytes": self.bytes,
            "length": self.length,
            "stride": self.stride,
            "seconds": round(self.seconds, 3),
        }


def read_texts(path: Path, key: str = "text") -> Iterator[str]:
    """Yields the texts of a .jsonl file, one a line under `key`; any other file is one text.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a line has no such text, or the file is empty.
    """
    content = read_text(path)
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        expected = f'expected a JSON object with {key!r}, as in {{"{key}": "..."}}'
        try:
            values = parse_json(line, place)
        except UserError as error:
            raise UserError(f"{error}; {expected}") from error
        if not isinstance(values, dict) or key not in values:
            raise UserError(f"{place}: {expected}")
        text = values[key]
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: {key!r} is {text!r}; expected text")
        yield text


def evaluate(
    pipeline: Pipeline,
    path: Path,
    *,
    rope: RopeArgument | None = None,
    length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    key: str = "text",
    show: bool = True,
) -> Evaluation:
    """Scores every token of every text but its first one, each once, in sliding windows.

    Args:
        path: a text file, or .jsonl.
        rope: used in place of the model's.
        length: tokens of a window; default: the context of the model, under the rope.
        stride: tokens between windows; default: half of `length`.
        max_tokens: the most tokens of a text; default: all.
        key: key of the texts in a .jsonl file.

    Raises:
        UserError: a file, a length or the rope is wrong, or the length does not fit in memory; it is raised
            before any work.
    """
    began = monotonic()
    scorer = Scorer(pipeline.compiled)
    config = scorer.config if rope is None else rope.apply(scorer.config)
    length = config.context_length if length is None else length
    stride = max(1, length // 2) if stride is None else stride
    parts: list[Part] = []
    documents = words = size = 0
    for text in read_texts(path, key):
        document = _document(pipeline.tokenizer, text, length, stride, max_tokens)
        if document is not None:
            parts += document.parts
            size += document.bytes
            words += document.words
            documents += 1
    if not parts:
        raise UserError(f"{path} has no text of two tokens or more")
    loss = _total_loss(scorer, parts, config, 0 if rope is None else rope.initial_tokens, show)
    return Evaluation(loss, documents, size, words, length, stride, monotonic() - began)


@dataclass(frozen=True)
class _Document:
    """The windows of a text, and the sizes that are scored."""

    parts: list[Part]
    bytes: int
    words: int


def _document(
    tokenizer: Phi3Tokenizer, text: str, length: int, stride: int, max_tokens: int | None
) -> _Document | None:
    """Returns a text in windows, or None if it has fewer than two tokens."""
    ids = first_tokens(tokenizer, text, max_tokens)
    if len(ids) < 2:
        return None
    if max_tokens is not None:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    parts = [
        Part(ids[window.begin : window.end], window.scored_from - window.begin)
        for window in windows(len(ids), length, stride)
    ]
    first = tokenizer.decode(ids[:1], skip_special_tokens=True)
    return _Document(parts, len(text.encode()) - len(first.encode()), len(text.split()))


def _total_loss(
    scorer: Scorer, parts: list[Part], config: Phi3Config, initial_tokens: int, show: bool
) -> TextLoss:
    total, done, all_tokens = TextLoss(0.0, 0), 0, sum(len(part.tokens) for part in parts)
    with FileProgress(all_tokens, show) as bar:

        def update(more: int) -> None:
            nonlocal done
            done += more
            bar.update(f"{done:,} of {all_tokens:,} tokens", done)

        for _, scores in score_all(scorer, parts, config, initial_tokens=initial_tokens, progress=update):
            total += TextLoss(scores.loss, len(scores.losses))
    return total
