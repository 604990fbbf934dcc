"""Perplexity, and bits per byte, of a file of texts."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss, windows
from phi3_jax.evaluation.score_all import Part, score_all
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.evaluation.texts import first_tokens, read_text
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.progress import FileProgress


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts texts."""

    loss: TextLoss
    documents: int
    bytes: int
    """Of the texts in UTF-8, without what is not predicted: each one's first token, unless it is a special
    one."""
    words: int
    """Of the texts, between white space."""
    length: int
    stride: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was counted, and what follows from it."""
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
    """The texts of a .jsonl file, one a line under `key`; any other file is one text.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that has no such text; nothing to evaluate.
    """
    content = read_text(path)
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: expected a JSON object with {key!r}, as in {{"{key}": "..."}}'
            ) from error
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
        rope: in place of the model's.
        length: of windows; default: the context of the model, under the rope.
        stride: between windows; default: half of `length`.
        max_tokens: of each text; default: all.
        key: of a .jsonl file's texts.

    Raises:
        ValueError: files, lengths or a rope that cannot be, a length that memory cannot hold: before any
            work.
    """
    began = monotonic()
    scorer, tokenizer = Scorer(pipeline.compiled), pipeline.tokenizer
    config = scorer.config if rope is None else rope.apply(scorer.config)
    length = config.context_length if length is None else length
    stride = max(1, length // 2) if stride is None else stride
    parts: list[Part] = []
    documents = words = size = 0
    for text in read_texts(path, key):
        ids = first_tokens(tokenizer, text, max_tokens)
        if len(ids) < 2:
            continue
        if max_tokens is not None:
            text = tokenizer.decode(ids, skip_special_tokens=True)
        parts += [
            Part(ids[window.begin : window.end], window.scored_from - window.begin)
            for window in windows(len(ids), length, stride)
        ]
        first = tokenizer.decode(ids[:1], skip_special_tokens=True)
        size += len(text.encode()) - len(first.encode())
        words += len(text.split())
        documents += 1
    if not parts:
        raise UserError(f"{path} has no text of two tokens or more")
    total = TextLoss(0.0, 0)
    done, all_tokens = 0, sum(len(part.tokens) for part in parts)
    with FileProgress(all_tokens, show) as bar:

        def tell(more: int) -> None:
            nonlocal done
            done += more
            bar.update(f"{done:,} of {all_tokens:,} tokens", done)

        initial_tokens = 0 if rope is None else rope.initial_tokens
        for _, scores in score_all(scorer, parts, config, initial_tokens=initial_tokens, progress=tell):
            total += TextLoss(scores.loss, len(scores.losses))
    return Evaluation(total, documents, size, words, length, stride, monotonic() - began)
