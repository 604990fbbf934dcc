"""Tokenizers of transformers, whose answers are stored."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from answers import stored


class TheirTokenizer:
    """A tokenizer of transformers, loaded on first use; its answers are stored under its name and options."""

    def __init__(self, name: str, folder: Path, kind: str = "AutoTokenizer", **options: Any):
        self.folder, self.kind, self.options = folder, kind, options
        self.answer_key = (name, kind, options)

    @cached_property
    def tokenizer(self) -> Any:
        import transformers

        return getattr(transformers, self.kind).from_pretrained(self.folder, **self.options)

    def ask(self, method: str, each: Sequence[Any], **options: Any) -> list[Any]:
        """Returns the method's answer to each argument, or tuple of arguments; arrays become lists."""
        return json.loads(_ask(self, method, list(each), **options))

    def attributes(self, *names: str) -> dict[str, Any]:
        """Returns these attributes, and the `length`."""
        return json.loads(_attributes(self, names))


# JSON stores many small lists in little space.


@stored
def _ask(theirs: TheirTokenizer, method: str, each: list[Any], **options: Any) -> str:
    function = getattr(theirs.tokenizer, method)
    answers = [function(*(one if isinstance(one, tuple) else (one,)), **options) for one in each]
    return json.dumps([_plain(answer) for answer in answers], ensure_ascii=False, separators=(",", ":"))


@stored
def _attributes(theirs: TheirTokenizer, names: tuple[str, ...]) -> str:
    found = {name: getattr(theirs.tokenizer, name) for name in names}
    return json.dumps(found | {"length": len(theirs.tokenizer)})


def _plain(answer: Any) -> Any:
    if isinstance(answer, Mapping):
        words = answer.word_ids() if answer.encodings and len(answer.encodings) == 1 else None
        return {name: _plain(value) for name, value in answer.items()} | {"word_ids": words}
    return answer.tolist() if hasattr(answer, "tolist") else answer
