"""Small vocabularies for tests of the tokenizer, and transformers' tokenizer of the same files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from their_tokenizer import TheirTokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A tokenizer turns text into ids; the model never sees a single letter of it.",
    "  Two leading spaces, then 12345 digits, then a\ttab and more of the same text.",
    "She said: don't stop, it isn't late, we're here and they've been there before.",
] * 6
# Names with all flags, and texts in which a space or a newline makes a difference.
ADDED = {
    "<|end|>": {"rstrip": True, "special": True},
    "<|user|>": {"rstrip": True, "special": True},
    "<|assistant|>": {"special": True},
    "<|system|>": {"special": True},
    "<tool>": {"special": False},
    "<tool>s": {"special": False},
    "<left>": {"lstrip": True, "special": True},
    "word": {"single_word": True, "special": False},
}


def config_of(first_id: int, **more: object) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = {
        str(first_id + n): {"content": content, **flags, **own}
        for n, (content, own) in enumerate(ADDED.items())
    }
    return {"added_tokens_decoder": added, "tokenizer_class": "PreTrainedTokenizerFast", **more}


def train_pieces(sentences: Sequence[str], vocab_size: int, **options: object) -> bytes:
    """Returns a tokenizer.model with the settings of Llama's, trained on the sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def reference(name: str, folder: Path, **options: object) -> TheirTokenizer:
    """Returns transformers' tokenizer that reads tokenizer.json unchanged, as for `model_type` phi3."""
    return TheirTokenizer(name, folder, "PreTrainedTokenizerFast", **options)
