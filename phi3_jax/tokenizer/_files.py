"""Reads a tokenizer's files, with errors that name them, and writes them whole or not at all."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.runs.exchange import restore
from phi3_jax.runs.odd_values import read_odd
from phi3_jax.runs.text import parse_json
from phi3_jax.storage.outputs import exchanging
from phi3_jax.storage.targets import Target

from . import _tiktoken
from ._backends import Backend, JsonBackend, SentencePieceBackend

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", _tiktoken.FILE)
_CONFIGS = (CONFIG, "special_tokens_map.json", "added_tokens.json")
TEMPLATES = (TEMPLATE, "chat_template.json")
TOKENIZER_FILES = (*_VOCABULARIES, *_CONFIGS, *TEMPLATES)
"""Names of all files that a tokenizer is read from."""
_ANY_FILE = re.compile("|".join(map(re.escape, TOKENIZER_FILES)))

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_PHI3_PIECES = 32000


def read_folder(directory: Path) -> tuple[Backend, dict[str, Any], dict[str, bytes]]:
    """Returns the vocabulary, the merged configuration of all files, and the bytes of all files.

    Raises:
        FileNotFoundError: there is no such folder, or no vocabulary in it. UserError: a file is broken.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no tokenizer at {directory}: there is no such folder")
    restore(directory)
    files = {
        name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()
    }
    backend: Backend
    if "tokenizer.json" in files:
        backend = JsonBackend(files["tokenizer.json"], str(directory / "tokenizer.json"))
    elif "tokenizer.model" in files:
        backend = SentencePieceBackend(files["tokenizer.model"], str(directory / "tokenizer.model"))
    elif _tiktoken.FILE in files:
        path = str(directory / _tiktoken.FILE)
        backend = JsonBackend(_tiktoken.phi3_small_tokenizer(files[_tiktoken.FILE], path).to_str(), path)
    else:
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"no tokenizer in {directory}: looked for {' and '.join(_VOCABULARIES)}, found {found}"
        )
    texts = {
        name: _json_object(files[name], directory / name)
        for name in (*_CONFIGS, TEMPLATES[1])
        if name in files
    }
    config = _merge(texts)
    if isinstance(backend, SentencePieceBackend):
        if not any(name in files for name in _CONFIGS):
            config |= phi3_config() if backend.vocab_size == _PHI3_PIECES else {}
        config = backend.named_tokens | config
    elif "tokenizer.json" not in files:
        config = _tiktoken.merge_config(config)
        files.pop(CONFIG, None)  # it names Microsoft's class, which reads no tokenizer.json
    if TEMPLATE in files:
        try:
            config["chat_template"] = files[TEMPLATE].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{directory / TEMPLATE} is not valid UTF-8: {error.reason}") from error
    _forgive(config, directory / CONFIG)
    return backend, config, files


def read_gguf(path: Path) -> tuple[Backend, dict[str, Any], dict[str, bytes]]:
    """Returns the vocabulary and the configuration of a GGUF file, and no files.

    Raises:
        CheckpointError: the file is broken, or its kind of tokenizer is not supported.
        FileNotFoundError: it has none.
    """
    # These import the packages `gguf` and `ml_dtypes`, which other tokenizers do not need.
    from phi3_jax.sources.gguf_file import GGUFFile
    from phi3_jax.sources.gguf_tokenizer import Vocabulary

    file = GGUFFile(path)
    vocabulary = Vocabulary.of(path, file.metadata)
    if vocabulary is None:
        raise FileNotFoundError(f"{path} holds no tokenizer")
    backend = JsonBackend(vocabulary.tokenizer().to_str(), str(path))
    return backend, vocabulary.tokenizer_config(file.require("{arch}.context_length")), {}


def write_files(directory: Target, files: Mapping[str, bytes]) -> None:
    """Writes the files, which replace those of an earlier tokenizer; all or none.

    Raises:
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    vocabulary = next(name for name in _VOCABULARIES if name in files)
    with exchanging(directory, config=vocabulary, replaced=_ANY_FILE) as work:
        for name, content in files.items():
            (work / name).write_bytes(content)


def phi3_config() -> dict[str, Any]:
    """Returns Phi-3-mini's configuration (July 2024), for a folder with only tokenizer.model."""
    names = ["endoftext", "assistant", "placeholder1", "placeholder2", "placeholder3", "placeholder4"]
    names += ["system", "end", "placeholder5", "placeholder6", "user"]
    added = {
        # All but the end of text remove the white space after them.
        str(_PHI3_PIECES + n): _flags(f"<|{name}|>", rstrip=name != "endoftext", special=True)
        for n, name in enumerate(names)
    }
    added["2"] = _flags("</s>", rstrip=True, special=False)
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Returns the tokens of `added_tokens_decoder`, by id."""
    tokens = {}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise UserError(f"added_tokens_decoder must be an object of ids and tokens, got {decoder!r:.80}")
    for token_id, entry in decoder.items():
        if not str(token_id).isdecimal() or len(str(token_id)) > 10:
            raise UserError(f"added_tokens_decoder has the key {token_id!r:.40}, which is not a token id")
        entry = _flags(entry, special=True) if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise UserError(
                f"added_tokens_decoder[{token_id!r}] must have a text under 'content', got {entry!r:.80}"
            )
        flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
        tokens[int(token_id)] = AddedToken(entry["content"], **({"normalized": False} | flags))
    return tokens


def token_entry(token: AddedToken) -> dict[str, Any]:
    """Returns an entry of `added_tokens_decoder`."""
    return {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}


def token_text(entry: str | Mapping[str, Any] | None) -> str | None:
    """Returns the text of a token, which the configs write as such or as a dict with `content`."""
    return entry["content"] if isinstance(entry, Mapping) else entry


def extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Returns the special tokens without a role, under the old name and the new."""
    entries = list(config.get("additional_special_tokens") or [])
    extra = config.get("extra_special_tokens") or []
    entries += extra.values() if isinstance(extra, Mapping) else extra
    return [text for entry in entries if (text := token_text(entry)) is not None]


def chat_templates(entry: Any) -> str | dict[str, str] | None:
    """Returns the templates of a `chat_template` entry: one, or several by name."""
    if entry is None or isinstance(entry, str):
        return entry
    try:
        named = dict(entry) if isinstance(entry, Mapping) else {one["name"]: one["template"] for one in entry}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise UserError(
            f"chat_template must be a template or a list of dicts with name and template, got {entry!r:.80}"
        )
    return named


# The fields that a config may be without: what each must be, in words and as a test.
_OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(NAMED_TOKENS, ("a token, or an object with content", lambda v: _is_token(v))),
    **dict.fromkeys(
        ("padding_side", "truncation_side"), ("'left' or 'right'", ("left", "right").__contains__)
    ),
    "model_max_length": ("a positive number", lambda v: type(v) in (int, float) and 0 < v < 1e40),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), ("true or false", lambda v: type(v) is bool)),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"),
        (
            "a list of tokens",
            lambda v: (
                isinstance(v, list | dict) and all(map(_is_token, v.values() if isinstance(v, dict) else v))
            ),
        ),
    ),
}


def _token_entries(value: Any) -> list[Any]:
    """Returns the tokens of a field, which has one, or a list or an object of several."""
    if isinstance(value, list):
        return value
    return list(value.values()) if isinstance(value, Mapping) and not _is_token(value) else [value]


def _is_token(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, Mapping) and isinstance(entry.get("content"), str))


def _forgive(config: dict[str, Any], path: Path) -> None:
    """Leaves out fields whose values have no meaning, with warnings that name the file.

    Raises:
        UserError: the added tokens or the chat template have no meaning.
    """
    for name, (words, holds) in _OPTIONAL.items():
        if config.get(name) is not None:
            config[name] = read_odd(name, config[name], holds, None, path, words)
    try:
        added_tokens(config)
        chat_templates(config.get("chat_template"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _merge(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    names = (*NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens")
    special_map = {
        name: entry
        for name, entry in texts.get("special_tokens_map.json", {}).items()
        if name in names and _OPTIONAL[name][1](entry)
    }
    config = {**special_map, **texts.get(CONFIG, {})}
    entries = [each for values in map(_token_entries, special_map.values()) for each in values]
    flags = {entry["content"]: entry for entry in entries if isinstance(entry, Mapping)}
    roles = [config.get(name) for name in NAMED_TOKENS]
    specials = {token_text(entry) for entry in (*entries, *roles) if _is_token(entry)}
    added = {
        str(token_id): {**_flags(content, special=content in specials), **flags.get(content, {})}
        for content, token_id in texts.get("added_tokens.json", {}).items()
    }
    decoder = config.get("added_tokens_decoder") or {}
    if added and isinstance(decoder, Mapping):
        config["added_tokens_decoder"] = added | dict(decoder)
    if "chat_template" in texts.get("chat_template.json", {}):
        config["chat_template"] = texts["chat_template.json"]["chat_template"]
    return config


def _flags(content: str, *, rstrip: bool = False, special: bool) -> dict[str, Any]:
    flags: dict[str, Any] = dict.fromkeys(_FLAGS, False)
    return {"content": content, **flags, "rstrip": rstrip, "special": special}


def _json_object(content: bytes, path: Path) -> dict[str, Any]:
    value = parse_json(content, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
