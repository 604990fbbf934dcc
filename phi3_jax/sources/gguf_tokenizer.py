"""Builds the tokenizer of a GGUF file from its vocabulary and the name of its splitting rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from phi3_jax.errors import CheckpointError
from phi3_jax.runs.panics import panics_as_errors

Metadata = Callable[..., Any]
"""Returns the value of a metadata key, or None (or the given default) where the file lacks it."""


class TokenType(IntEnum):
    """The values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By tokenizer.ggml.pre, the pattern that cuts text into words. phi-4 is "dbrx", phi-4-mini "gpt-4o".
SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "dbrx": _LLAMA3_SPLIT,
    "gpt-4o": _GPT4O_SPLIT,
}
# Every split of every piece is tried, which takes time with the square of its length.
_MOST_CHARACTERS = 256
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_END_TOKENS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>")
# The only special tokens of Phi-3's SentencePiece model that keep the white space after them.
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """A GGUF file's vocabulary: the meanings of its tokenizer.ggml.* keys."""

    path: Path
    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    special: Mapping[str, str]  # "bos_token" and the like -> the token
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    right_strip: bool
    chat_template: str | None

    @classmethod
    def of(cls, path: Path, metadata: Metadata) -> "Vocabulary | None":
        """Returns the vocabulary of the file at `path`, or None if it has none.

        Raises:
            CheckpointError: its kind is not supported, or its parts do not fit together.
        """

        def get(key: str, default: Any = None) -> Any:
            return metadata(f"tokenizer.ggml.{key}", default)

        model = get("model", "none")
        if model in ("none", "no_vocab"):
            return None
        if model not in ("gpt2", "llama"):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.model {model!r} is not supported; supported: gpt2, llama"
            )
        tokens = get("tokens")
        if not tokens:
            raise CheckpointError(f"{path}: the metadata lacks 'tokenizer.ggml.tokens'")
        for key in ("token_type", "scores"):
            if (values := get(key)) is not None and len(values) != len(tokens):
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.{key} has {len(values)} values for {len(tokens)} tokens"
                )
        pre = get("pre", "default")
        ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        found = {name: get(f"{key}_token_id") for name, key in ids.items()}
        if outside := {name: i for name, i in found.items() if i is not None and i >= len(tokens)}:
            raise CheckpointError(f"{path}: {outside} lies outside the vocabulary of {len(tokens)} tokens")
        return cls(
            path=path,
            model=model,
            pre=pre,
            tokens=tokens,
            types=get("token_type") or [TokenType.NORMAL] * len(tokens),
            scores=get("scores"),
            merges=get("merges"),
            special={name: tokens[i] for name, i in found.items() if i is not None},
            # The defaults are llama.cpp's.
            add_bos=get("add_bos_token", model == "llama" or pre in _LLAMA3_NAMES),
            add_eos=get("add_eos_token", False),
            space_prefix=get("add_space_prefix", True),
            # No key says which tokens remove the white space after them; llama.cpp too decides by the model.
            right_strip=model == "llama" and metadata("general.architecture") == "phi3",
            chat_template=metadata("tokenizer.chat_template"),
        )

    def added_tokens(self) -> dict[int, AddedToken]:
        """Returns the tokens that are cut out of a text before any splitting, by id."""
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        ids = self._vocab()
        return {
            i: AddedToken(
                token,
                rstrip=self.right_strip and token not in _PHI3_KEEPS_SPACE,
                normalized=False,
                special=kind != TokenType.USER_DEFINED,
            )
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in kinds and ids[token] == i
        }

    def tokenizer(self) -> Tokenizer:
        """Builds the `tokenizers` tokenizer that gives llama.cpp's ids."""
        tokenizer = self._byte_level() if self.model == "gpt2" else self._sentencepiece()
        for token in self.added_tokens().values():
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        bos = self.special.get("bos_token") if self.add_bos else None
        eos = self.special.get("eos_token") if self.add_eos else None
        if bos or eos:
            ends = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*filter(None, (bos, "$A", eos))],
                pair=[*filter(None, (bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1"))],
                special_tokens=ends,
            )
        return tokenizer

    def tokenizer_config(self, context: int) -> dict[str, Any]:
        """Returns the contents of tokenizer_config.json as transformers reads it."""
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special,
            "added_tokens_decoder": {
                str(i): {field: getattr(token, field) for field in fields}
                for i, token in self.added_tokens().items()
            },
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "padding_side": "left",
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    def end_tokens(self) -> list[int]:
        """Returns the ids of the tokens with which this model's chat template ends a turn."""
        template = self.chat_template or ""
        kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
        return [
            i
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in kinds and token in _END_TOKENS and token in template
        ]

    def _vocab(self) -> dict[str, int]:
        """Returns each token's id, without the unused tokens at the end; of equal tokens the first counts."""
        last = max((i for i, kind in enumerate(self.types) if kind != TokenType.UNUSED), default=-1)
        vocab: dict[str, int] = {}
        for i, token in enumerate(self.tokens[: last + 1]):
            vocab.setdefault(token, i)
        return vocab

    def _bpe(self, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
        try:
            with panics_as_errors(str(self.path)):
                return Tokenizer(BPE(self._vocab(), merges, **options))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{self.path}: the vocabulary and merges do not fit: {error}") from error

    def _byte_level(self) -> Tokenizer:
        if self.merges is None:
            raise CheckpointError(f"{self.path}: the metadata lacks 'tokenizer.ggml.merges'")
        merges = [self._pair(merge) for merge in self.merges]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if self.pre == "gpt-2":
            splitter: pre_tokenizers.PreTokenizer = byte_level
        elif self.pre == "smollm":
            splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        elif self.pre in SPLITS:
            words = pre_tokenizers.Split(Regex(SPLITS[self.pre]), behavior="isolated")
            raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            splitter = pre_tokenizers.Sequence([words, raw])
        else:
            known = ", ".join(["gpt-2", "smollm", *SPLITS])
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.pre {self.pre!r} is not supported; supported: {known}. "
                "Take tokenizer.json from the original model instead"
            )
        # Llama 3 never splits a word that is in the vocabulary, whatever its merges are.
        tokenizer = self._bpe(merges, ignore_merges=self.pre in _LLAMA3_NAMES)
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _pair(self, merge: str) -> tuple[str, str]:
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.merges holds {merge!r}, which is not a pair")
        return left, right

    def _sentencepiece(self) -> Tokenizer:
        unknown = next(
            (t for t, kind in zip(self.tokens, self.types, strict=True) if kind == TokenType.UNKNOWN), None
        )
        tokenizer = self._bpe(
            self._merges_by_score(),
            unk_token=self.special.get("unk_token", unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
        space = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.space_prefix:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
            steps.append(decoders.Strip(" ", 1, 0))
        else:
            tokenizer.normalizer = space
        tokenizer.decoder = decoders.Sequence(steps)
        return tokenizer

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Returns every split of every piece, best piece first: the order in which SentencePiece merges."""
        if self.scores is None:
            raise CheckpointError(f"{self.path}: the metadata lacks 'tokenizer.ggml.scores'")
        pieces = {
            token: score
            for token, score, kind in zip(self.tokens, self.scores, self.types, strict=True)
            if kind == TokenType.NORMAL
        }
        ids = self._vocab()
        if (longest := max(map(len, pieces), default=0)) > _MOST_CHARACTERS:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.tokens holds a piece of {longest:,} characters; at most "
                f"{_MOST_CHARACTERS} are read"
            )
        return [
            (piece[:cut], piece[cut:])
            for piece in sorted(pieces, key=pieces.__getitem__, reverse=True)
            for cut in sorted(range(1, len(piece)), key=lambda cut: ids.get(piece[:cut], 0))
            if piece[:cut] in pieces and piece[cut:] in pieces
        ]


def generation_config(metadata: Metadata, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Returns the contents of generation_config.json with every id that ends a turn.

    Many models never generate the eos token of the config.
    """
    keys = ("eos", "eot", "eom")
    ends = [metadata(f"tokenizer.ggml.{key}_token_id") for key in keys]
    ends += vocabulary.end_tokens() if vocabulary else []
    found = {
        "bos_token_id": metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)) or None,
        "pad_token_id": metadata("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in found.items() if value is not None}
