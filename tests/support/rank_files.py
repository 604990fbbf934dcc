"""Files of ranks as Phi-3-small's checkpoints have them, and tiktoken's answers for the same ranks."""

import base64
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from answers import stored
from small_tokenizers import SENTENCES
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from phi3_jax.tokenizer._assemblers import _BYTE_OF_CHARACTER

RANKS = 100_256
# Microsoft's names. All other ids from 100,256 to 100,351 are `<|dummy_id_N|>`.
SPECIAL = {
    "<|endoftext|>": 100_257,
    "<|fim_prefix|>": 100_258,
    "<|fim_middle|>": 100_259,
    "<|fim_suffix|>": 100_260,
    "<|system|>": 100_261,
    "<|user|>": 100_262,
    "<|assistant|>": 100_263,
    "<|dummy_id_0|>": 100_264,
    "<|dummy_id_1|>": 100_265,
    "<|end|>": 100_266,
    "<|dummy_id_2|>": 100_256,
    **{f"<|dummy_id_{n}|>": 100_264 + n for n in range(3, 12)},
    "<|endofprompt|>": 100_276,
    **{f"<|dummy_id_{n}|>": 100_265 + n for n in range(12, 87)},
}
_MORE = [
    "Größe, naïve, déjà vu; Привет, мир! 你好世界。こんにちは 안녕하세요 שלום مرحبا हिन्दी ไทย",
    "😀👩‍👩‍👧 1234567890 ---- ==== \n\n\n    four\t\ttabs\r\n        eight",
]


@functools.cache
def sized_tokens() -> tuple[bytes, ...]:
    """Returns as many tokens as cl100k_base has: parts of words, then pairs and triples of large bytes."""
    tokenizer = Tokenizer(models.BPE())
    # White space at the end of a text joins no line break, as with the pattern of cl100k_base.
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)|\s?\w+|\s?[^\w\s]+|\s+"), behavior="isolated")
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, raw])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, *_MORE * 6], trainer)
    spelled = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    tokens = dict.fromkeys(bytes(map(_BYTE_OF_CHARACTER.__getitem__, token)) for token, _ in spelled)
    assert max(map(len, tokens)) > 5
    high = range(0x80, 0x100)
    fillers = itertools.chain(itertools.product(high, repeat=2), itertools.product(high, repeat=3))
    while len(tokens) < RANKS:
        tokens[bytes(next(fillers))] = None
    return tuple(tokens)


def rank_file(tokens: Sequence[bytes]) -> bytes:
    """Returns the file of the tokens, in the order of their ranks."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


class TheirRanks:
    """tiktoken's encoding of these ranks with the pattern of cl100k_base; its answers are stored."""

    def __init__(self, tokens: Sequence[bytes], special: Mapping[str, int] = SPECIAL):
        self._tokens, self._special = tokens, special
        self.answer_key = (hashlib.sha256(rank_file(tokens)).hexdigest(), dict(special))

    @functools.cached_property
    def encoding(self) -> Any:
        import tiktoken
        import tiktoken_ext.openai_public

        with mock.patch.object(tiktoken_ext.openai_public, "load_tiktoken_bpe", return_value={}):
            pattern = tiktoken_ext.openai_public.cl100k_base()["pat_str"]  # without a download of the ranks
        ranks = {token: rank for rank, token in enumerate(self._tokens)}
        return tiktoken.Encoding(
            "test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(self._special)
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return json.loads(_encode(self, [text.encode() for text in texts]))

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return json.loads(_decode(self, [list(row) for row in rows]))

    def digest(self, text: str) -> list[Any]:
        """Returns the number of a long text's ids, and their digest."""
        return json.loads(_digest(self, text.encode()))


def ids_digest(ids: Sequence[int]) -> list[Any]:
    return [len(ids), hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()]


# The texts are bytes, since the `repr` of a text, which names the answer, depends on Python's version.


@stored
def _encode(theirs: TheirRanks, texts: list[bytes]) -> str:
    return json.dumps([theirs.encoding.encode(text.decode(), allowed_special="all") for text in texts])


@stored
def _decode(theirs: TheirRanks, rows: list[list[int]]) -> str:
    return json.dumps([theirs.encoding.decode(row) for row in rows])


@stored
def _digest(theirs: TheirRanks, text: bytes) -> str:
    return json.dumps(ids_digest(theirs.encoding.encode(text.decode(), allowed_special="all")))
