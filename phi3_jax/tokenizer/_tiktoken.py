"""Builds the tokenizer of Phi-3-small from a file of ranks, the vocabulary of OpenAI's library tiktoken.

No file has the names and ids of the special tokens. They are those of Microsoft's
`tokenization_phi3_small.py`.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from phi3_jax.errors import UserError
from phi3_jax.sources.gguf_tokenizer import SPLITS

from ._assemblers import _BYTE_OF_CHARACTER

FILE = "cl100k_base.tiktoken"

_RANKS = 100_256
_IDS = 100_352
# The longest token has 128 bytes. The time for the merges of a token grows with the cube of its length.
_MOST_BYTES = 128
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}
_NAMES = {
    100_257: "endoftext",
    100_258: "fim_prefix",
    100_259: "fim_middle",
    100_260: "fim_suffix",
    100_261: "system",
    100_262: "user",
    100_263: "assistant",
    100_266: "end",
    100_276: "endofprompt",
}
# The first three unused ids are numbered in another order than the rest.
_UNUSED = (100_264, 100_265, _RANKS, *(i for i in range(100_267, _IDS) if i not in _NAMES))


def phi3_small_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Builds the tokenizer from the content of the file; `name` is for errors.

    Raises:
        UserError: a line is not a token in base64, a space and its rank; or a rank or a token is missing, or
            occurs twice.
    """
    tokens = read_ranks(content, name)
    if len(tokens) != _RANKS:
        problem = "it may be cut short" if len(tokens) < _RANKS else "it is the vocabulary of another model"
        raise UserError(
            f"{name} has {len(tokens):,} ranks; expected {_RANKS:,}, since the ids of the special tokens "
            f"follow them: {problem}; download it again"
        )
    tokenizer = byte_level_tokenizer(tokens)
    for token in special_tokens().values():
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def merge_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's configuration as that of the tokenizer.json that is made of the ranks.

    Microsoft's class sets bos, eos and the padding side; the end of text is also the family's padding. It
    ignores added tokens of the configuration, since its own have fixed ids.
    """
    given = {key: value for key, value in config.items() if value is not None}
    for key in ("added_tokens_decoder", "auto_map", "tokenizer_class"):
        given.pop(key, None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
        "padding_side": "left",
        **given,
    }


def special_tokens() -> dict[int, AddedToken]:
    """Returns the tokens after the ranks, by id; every id up to the end of the embedding has one.

    The first, 100256, is not flagged special: Microsoft's class drops the ids from the end of text on.
    """
    names = _NAMES | {token_id: f"dummy_id_{n}" for n, token_id in enumerate(_UNUSED)}
    return {
        token_id: AddedToken(f"<|{names[token_id]}|>", special=token_id != _RANKS, normalized=False)
        for token_id in range(_RANKS, _IDS)
    }


def read_ranks(content: bytes, name: str) -> list[bytes]:
    """Returns the tokens of a file of ranks, in the order of their ranks.

    Raises:
        UserError: as `phi3_small_tokenizer`, but for any number of ranks.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not (token and rank.isdigit() and len(rank) < 9):
                raise ValueError(line)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{name}, line {number}: expected a token in base64, a space and its rank, got {line!r:.60}"
            ) from error
        if len(token) > _MOST_BYTES:
            raise UserError(
                f"{name}, line {number}: the token has {len(token):,} bytes; at most {_MOST_BYTES} are "
                "accepted"
            )
        if int(rank) in tokens:
            raise UserError(f"{name}, line {number}: the rank {int(rank)} occurs twice")
        tokens[int(rank)] = token
    if not tokens:
        raise UserError(f"{name} has no ranks; download it again")
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise UserError(f"{name} has the rank {max(tokens)}, but not {missing}; download it again")
    ordered = [tokens[rank] for rank in range(len(tokens))]
    _check_tokens(ordered, name)
    return ordered


def _check_tokens(tokens: Sequence[bytes], name: str) -> None:
    ranks: dict[bytes, int] = {}
    for rank, token in enumerate(tokens):
        if ranks.setdefault(token, rank) != rank:
            raise UserError(f"{name}: the ranks {ranks[token]} and {rank} have the same token {token!r:.60}")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise UserError(
            f"{name} has no token for the byte 0x{lacking[0]:02x}; texts could not be encoded without loss"
        )


def byte_level_tokenizer(tokens: Sequence[bytes]) -> Tokenizer:
    """Builds the tokenizer that cuts texts as tiktoken's cl100k_base does, with these tokens by rank."""
    spelled = list(map(_spell, tokens))
    # A token that no merges reach is still taken if it is a whole word, as in tiktoken.
    model = BPE(
        {token: rank for rank, token in enumerate(spelled)},
        [(_spell(left), _spell(right)) for left, right in find_merges(tokens)],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    # The newest tiktoken also takes the white space at the end of a text as one word. The ids are the same,
    # since no token of cl100k_base ends with spaces after a line break.
    words = pre_tokenizers.Split(Regex(SPLITS["dbrx"]), behavior="isolated")
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, raw])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def find_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the pair of tokens that each token is merged from, in the order of the ranks.

    tiktoken merges the neighbours whose union has the lowest rank, the first of equals. Within the bytes of a
    token it chooses as it would in a text of these bytes alone, because a merge across their border prevents
    the token. So the token has one pair at most: the last two parts of its own bytes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = (_halves(token, ranks) for token in tokens if len(token) > 1)
    return [pair for pair in pairs if pair is not None]


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the last two parts of a token, or None if fewer merges are possible."""
    parts = [token[at : at + 1] for at in range(len(token))]
    none = len(ranks)
    while len(parts) > 2:
        unions = [ranks.get(parts[at] + parts[at + 1], none) for at in range(len(parts) - 1)]
        lowest = min(unions)
        if lowest == none:
            return None
        at = unions.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spell(token: bytes) -> str:
    """Returns the token as tokenizer.json writes it, with a character for each byte."""
    return "".join(map(_CHARACTER_OF_BYTE.__getitem__, token))
